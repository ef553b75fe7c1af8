"""A step's microbatches without pictures and captions: lengths of the planner's workload, packed as a run packs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.processing import ProcessedPrompt
from balcap_mega.models.vision import VisionInputs
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.planning.dry_run.device import DryDevice
from balcap_mega.planning.workload import Workload
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.batches import BatchBuilder, batch_builder
from balcap_mega.training.microbatch import Microbatch
from balcap_mega.training.off_policy import scored_prompts

WORD = 1
"""A token id that stands for text."""


@dataclass(frozen=True)
class SizedPrompts:
    """Takes the place of the checkpoint's processor: every prompt has the workload's image and text."""

    architecture: Architecture
    workload: Workload
    device: DryDevice

    @property
    def token_ids(self) -> tuple[int, ...]:
        words, image = self.workload.prefix_tokens - self.workload.image_tokens, self.workload.image_tokens
        return (WORD,) * (words // 2) + (self.architecture.image_token_id,) * image + (WORD,) * (words - words // 2)

    def __call__(self) -> ProcessedPrompt:
        shape, grid = self._picture
        return self._prompt(VisionInputs(self.device.host_tensor(*shape), grid))

    def without_pixels(self, token_ids: Sequence[int], size: tuple[int, int]) -> ProcessedPrompt:
        return self._prompt(VisionInputs.without_pixels(self._picture[1]))

    def image_tokens(self, token_ids: Sequence[int]) -> int:
        return self.workload.image_tokens

    @property
    def _picture(self) -> tuple[tuple[int, ...], torch.Tensor | None]:
        shape, grid = self.architecture.family.picture(self.architecture.config, self.workload.image_tokens)
        return shape, None if grid is None else torch.tensor([grid])

    def _prompt(self, vision: VisionInputs) -> ProcessedPrompt:
        config, tokens = self.architecture.config, self.token_ids
        positions = self.architecture.family.position_ids(config, torch.tensor(tokens), vision.image_grid_thw)
        return ProcessedPrompt(tokens, positions, vision)


@dataclass(frozen=True)
class OneRecord:
    """Takes the place of a step's `Prompts`: one record everywhere, whose picture is there when it is asked for."""

    record: CaptionRecord

    def __getitem__(self, place: int) -> CaptionRecord:
        return self.record

    def expects_picture(self, place: int) -> bool:
        return True

    def prepare_pictures(self, places: Sequence[int], prompt: SizedPrompts) -> None:
        pass

    def processed(self, place: int, prompt: SizedPrompts) -> ProcessedPrompt:
        return prompt()


class StepBatches:
    """Microbatches of the rank at `grid`, with pictures of their own each time."""

    def __init__(
        self,
        config: RunConfig,
        architecture: Architecture,
        workload: Workload,
        grid: ProcessGrid,
        device: DryDevice,
    ):
        record = CaptionRecord("", Image.new("RGB", (1, 1)), "", "")
        self._prompts = OneRecord(record)
        prompt = SizedPrompts(architecture, workload, device)
        self._builder: BatchBuilder = batch_builder(prompt, config, grid, architecture)
        self._updates = workload.updates
        self._groups = _groups(workload, prompt.token_ids, record)
        self._scored = scored_prompts(workload.prompts, grid.data_size)

    def to_train(self) -> tuple[tuple[Microbatch, ...], ...]:
        """Those of each update of a step."""
        nothing = torch.zeros(sum(len(group.rollouts) for group in self._groups))
        return self._builder.from_rollouts(
            self._prompts,
            self._groups,
            Advantages(nothing, nothing[None], nothing > 0),
            self._updates,
        ).minibatches

    def to_score(self) -> tuple[tuple[Microbatch, ...], int]:
        """Those that are scored because captions are sampled ahead, and how many captions of all ranks these are."""
        groups = self._groups[: self._scored]
        microbatches = self._builder.to_score(self._prompts, groups)
        return microbatches, sum(len(group.rollouts) for group in groups)


def _groups(workload: Workload, prefix: tuple[int, ...], record: CaptionRecord) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    for _ in range(workload.updates):
        lengths = workload.lengths(workload.captions // workload.updates)
        random.Random(0).shuffle(lengths)  # as the planner's `pack`
        for start in range(0, len(lengths), workload.group):
            rollouts = tuple(
                Rollout((WORD,) * length, (0.0,) * length, "", True)
                for length in lengths[start : start + workload.group]
            )
            groups.append(RolloutGroup(len(groups), prefix, rollouts, SeenRecord.of(0, record)))
    return groups
