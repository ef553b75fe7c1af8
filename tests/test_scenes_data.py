"""The scenes dataset: determinism, disjoint splits, truthful references, an honest flawed captioner, sound pictures."""

import hashlib
import re
from random import Random

import numpy as np
import pytest

from balcap_mega.config.schema import HabitsConfig
from balcap_mega.data.scenes import PROMPT, SceneRecord, ScenesDataset, flawed_caption, habitual_caption, vocabulary
from balcap_mega.data.scenes.flawed import FILLERS
from balcap_mega.data.scenes.grammar import reference_caption, reference_units
from balcap_mega.data.scenes.render import render
from balcap_mega.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    TEXTURES,
    Fact,
    Scene,
    SceneObject,
    draw_scene,
)


def tokens(text):
    return re.findall(r"\w+|[^\w\s]", text)


def test_a_record_depends_on_seed_split_and_index_alone():
    one, other = ScenesDataset(8, seed=3, split="train"), ScenesDataset(500, seed=3, split="train")
    assert one[5].scene == other[5].scene
    assert one[5].reference == other[5].reference
    assert np.array_equal(one[5].image, other[5].image)
    assert one[5].scene != one[6].scene
    assert one[5].scene != ScenesDataset(8, seed=4, split="train")[5].scene
    assert one[5].scene != ScenesDataset(8, seed=3, split="eval")[5].scene


def test_records_are_caption_records():
    record = ScenesDataset(4, seed=0, split="eval")[3]
    assert isinstance(record, SceneRecord)
    assert (record.id, record.prompt) == ("scenes-0-eval-3", PROMPT)
    assert record.image.mode == "RGB" and record.image.size == (112, 112)
    assert len(record.units) == len(reference_units(record.scene))


def test_indices_and_split_names_are_checked():
    dataset = ScenesDataset(4, seed=0, split="train")
    assert len(dataset) == 4
    assert len(list(dataset)) == 4  # the sequence protocol stops at IndexError
    for index in (-1, 4):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(ValueError, match="test"):
        ScenesDataset(4, seed=0, split="test")


def test_splits_share_no_scene_whatever_their_seeds():
    train = {ScenesDataset(400, seed, "train").scene(i).digest for seed in range(3) for i in range(400)}
    held_out = {ScenesDataset(400, seed, "eval").scene(i).digest for seed in range(3) for i in range(400)}
    assert not train & held_out
    assert len(train) > 1190 and len(held_out) > 1190  # repeats are rare


def test_scenes_vary_and_keep_their_promises():
    random = Random(0)
    scenes = [draw_scene(random) for _ in range(500)]
    for scene in scenes:
        assert MIN_OBJECTS <= len(scene.objects) <= MAX_OBJECTS
        assert len({item.place for item in scene.objects}) == len(scene.objects)
        assert len({(item.colour, item.kind) for item in scene.objects}) == len(scene.objects)
        places = [(item.row, item.column) for item in scene.objects]
        assert places == sorted(places)
        assert all((item.kind == "sign") == (item.word is not None) for item in scene.objects)
    items = [item for scene in scenes for item in scene.objects]
    assert {item.kind for item in items} == set(KINDS)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.texture for item in items} == set(TEXTURES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_every_reference_unit_is_true_and_distinct():
    dataset = ScenesDataset(200, seed=1, split="train")
    for index in range(200):
        scene = dataset.scene(index)
        units = reference_units(scene)
        assert all(map(scene.holds, units))
        assert len(set(units)) == len(units)


def test_reference_of_a_known_scene():
    scene = Scene(
        "grey",
        (
            SceneObject("circle", "orange", "small", "striped", "top left"),
            SceneObject("sign", "blue", "large", "plain", "bottom left", word="taxi"),
        ),
    )
    assert reference_caption(scene) == (
        "The image shows two objects on a grey background. At the top left is a small striped orange circle. "
        "At the bottom left is a large blue sign that reads taxi. The orange circle is above the blue sign."
    )
    assert reference_units(scene) == (
        Fact(None, "count", 2),
        Fact(None, "background", "grey"),
        Fact(0, "size", "small"),
        Fact(0, "texture", "striped"),
        Fact(0, "colour", "orange"),
        Fact(0, "kind", "circle"),
        Fact(0, "place", "top left"),
        Fact(1, "size", "large"),
        Fact(1, "colour", "blue"),
        Fact(1, "kind", "sign"),
        Fact(1, "word", "taxi"),
        Fact(1, "place", "bottom left"),
        Fact(0, "above", 1),
    )


def test_texts_stay_within_a_small_vocabulary_and_length():
    words = vocabulary()
    assert words == sorted(set(words)) and len(words) <= 250
    dataset = ScenesDataset(1000, seed=2, split="train")
    for index in range(1000):
        scene = dataset.scene(index)
        reference = reference_caption(scene)
        assert 25 <= len(reference.split()) <= 65
        assert set(tokens(reference)) | set(tokens(flawed_caption(scene, seed=index))) <= set(words)
    assert set(tokens(PROMPT)) <= set(words)


def test_flawed_captions_are_deterministic_and_varied():
    scene = ScenesDataset(1, seed=0, split="train").scene(0)
    assert flawed_caption(scene, 7) == flawed_caption(scene, 7)
    assert len({flawed_caption(scene, seed) for seed in range(50)}) > 40


def test_pixels_show_what_the_scene_says():
    """Within the frame, each object's quarter holds its colour; an empty quarter holds the background alone."""
    red, green = np.array([225, 45, 45]), np.array([40, 165, 70])
    scene = Scene(
        "white",
        (
            SceneObject("square", "red", "large", "plain", "top left"),
            SceneObject("circle", "green", "small", "plain", "bottom right"),
        ),
    )
    pixels = np.asarray(render(scene)).astype(int)
    assert (pixels[0] == pixels[-1]).all() and (pixels[:, 0] != 255).any(-1).all()  # the frame
    assert np.abs(pixels[28, 28] - red).max() <= 2
    assert np.abs(pixels[84, 84] - green).max() <= 2
    assert (pixels[5:56, 56:-5] > 250).all() and (pixels[56:-5, 5:56] > 250).all()
    covered = [(pixels[5:56, 5:56] < 250).any(-1).mean(), (pixels[56:-5, 56:-5] < 250).any(-1).mean()]
    assert covered[0] > 3 * covered[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_textures_and_words_look_different(kind):
    def draw(**changes):
        item = {"kind": kind, "colour": "blue", "size": "large", "texture": "plain", "place": "top left"} | changes
        return np.asarray(render(Scene("white", (SceneObject(**item),)))).astype(int)

    plain = draw()
    variants = [draw(kind=other) for other in KINDS if other != kind]
    variants += [
        draw(texture="striped"),
        draw(texture="dotted"),
        draw(word="stop"),
        draw(word="taxi"),
        draw(size="small"),
    ]
    for variant in variants:
        assert (np.abs(variant - plain).max(-1) > 60).sum() > 60


def test_size_is_free():
    scene = ScenesDataset(1, seed=0, split="train").scene(0)
    assert render(scene, 224).size == (224, 224)
    assert ScenesDataset(1, seed=0, split="train", image_size=56)[0].image.size == (56, 56)


def test_the_quickstarts_captioner_stays_the_one_its_table_is_about():
    dataset = ScenesDataset(200, seed=0, split="train")
    captions = "\n".join(flawed_caption(dataset.scene(index), index) for index in range(200))
    assert hashlib.sha256(captions.encode()).hexdigest().startswith("c1628d8c3ef89cb5")


HABITS = {  # what shows in a caption that has it
    "guess": None,  # looks like any other description
    "hedge": r"may be|\bor\b",
    "enumerate": r"There is an? \w+(,| and)",
    "restate": r"The (\w+ )+is at the",
    "invent": r"outline|shadow|paper|scratch",
    "comment": "|".join(map(re.escape, FILLERS)),
    "double": None,
    "third": None,
}


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_as_frequent_as_it_is_said_to_be(habit):
    scenes = [ScenesDataset(300, seed=4, split="train").scene(index) for index in range(300)]

    def captions(chance):
        return [habitual_caption(scene, 1, HabitsConfig(**{habit: chance})) for scene in scenes]

    honest, always, rarely = captions(0.0), captions(1.0), captions(0.1)
    if HABITS[habit]:
        shown = [bool(re.search(HABITS[habit], caption)) for caption in always]
        assert all(shown) and not any(re.search(HABITS[habit], caption) for caption in honest)
    changed = np.mean([one != other for one, other in zip(rarely, honest, strict=True)])
    assert 0.04 < changed < 0.16
    ratios = [len(c.split()) / len(reference_caption(s).split()) for c, s in zip(always, scenes, strict=True)]
    expected = {"double": (1.75, 2.4), "third": (0.1, 0.5)}.get(habit, (0.3, 2.0))
    assert expected[0] < np.mean(ratios) < expected[1]
