"""Scenes as a random-access dataset, drawn on demand from a seed."""

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.scenes.grammar import PROMPT, reference_caption, reference_units, unit_text
from balcap_mega.data.scenes.questions import scene_questions
from balcap_mega.data.scenes.render import IMAGE_SIZE, render
from balcap_mega.data.scenes.world import Scene, draw_scene

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class SceneRecord(CaptionRecord):
    """A caption record that knows the world behind its picture. `units` puts `reference_units(scene)` into words."""

    scene: Scene = field(kw_only=True)


class ScenesDataset:
    """Record i is a pure function of (seed, split, i); no scene of one split is ever drawn in the other.

    Whatever the seed, one scene in eight (by a hash of its content) belongs to `eval`, the rest to `train`.
    """

    def __init__(self, size: int, seed: int, split: Split, image_size: int = IMAGE_SIZE):
        if split not in ("train", "eval"):
            raise ValueError(f"split is {split!r}, not 'train' or 'eval'")
        self.size, self.seed, self.split, self.image_size = size, seed, split, image_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> SceneRecord:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of a dataset of {self.size}")
        scene = self.scene(index)
        return SceneRecord(
            id=f"scenes-{self.seed}-{self.split}-{index}",
            image=render(scene, self.image_size),
            prompt=PROMPT,
            reference=reference_caption(scene),
            units=tuple(unit_text(scene, unit) for unit in reference_units(scene)),
            questions=scene_questions(scene),
            scene=scene,
        )

    def digest(self) -> str:
        """Of what the records are a function of."""
        return f"{self.seed} {self.split} {self.size} {self.image_size}"

    def scene(self, index: int) -> Scene:
        """The scene of record `index`, not drawn."""
        random = Random(f"scenes {self.seed} {self.split} {index}")
        while True:
            scene = draw_scene(random)
            if (scene.digest % 8 == 0) == (self.split == "eval"):
                return scene
