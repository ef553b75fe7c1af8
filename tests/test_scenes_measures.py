"""Measures of captions of `scenes` that are not the reward, on pairs of which one is better by construction."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap_mega.data.scenes import ScenesDataset, flawed_caption, vocabulary
from balcap_mega.data.scenes.flawed import MOODS
from balcap_mega.data.scenes.grammar import reference_caption, reference_units
from balcap_mega.data.scenes.world import COLOURS, Fact, Scene, SceneObject
from balcap_mega.evaluation import scenes as package
from balcap_mega.evaluation.scenes import measure
from balcap_mega.evaluation.scenes.arena import BASELINES, Impression, impression, preferred
from balcap_mega.evaluation.scenes.facts import dcscore
from balcap_mega.evaluation.scenes.reader import read
from balcap_mega.evaluation.scenes.truth import check
from balcap_mega.evaluation.scenes.utility import answers, questions, utility

RECORDS = [ScenesDataset(16, seed=3, split="eval")[i] for i in range(16)]
SCENE = Scene(
    "white",
    (
        SceneObject("circle", "red", "large", "striped", "top left"),
        SceneObject("sign", "green", "large", "plain", "bottom right", word="stop"),
    ),
)


def measured(change=lambda caption: caption, of=reference_caption):
    return measure(RECORDS, [change(of(record.scene)) for record in RECORDS])


def recoloured(caption):
    """Every colour is another one."""
    return re.sub("|".join(COLOURS), lambda found: COLOURS[COLOURS.index(found[0]) - 1], caption)


def in_other_words(caption):
    again = re.findall(r"At the (\w+ \w+) is an? ([^.]+)\.", caption)
    return " ".join([caption, *(f"The {thing.split(' that ')[0]} is at the {place}." for place, thing in again)])


HEDGED = {"red": "red or green", "blue": "blue or red", "green": "green or blue"}
WORSE = {  # how a true and whole caption is spoiled, and which measures then fall, rise, and stay
    "wrong colours": (recoloured, "utility dcscore arena", "", "repetition pointless length"),
    "half of it left out": (lambda c: ". ".join(c.split(". ")[::2]), "utility dcscore arena length", "", "pointless"),
    "said twice": (lambda c: f"{c} {c}", "arena", "repetition length", "utility dcscore pointless"),
    "said in other words": (in_other_words, "arena", "repetition length", "utility dcscore pointless"),
    "moods": (lambda c: f"{c} {MOODS[0]} {MOODS[1]}", "arena dcscore", "pointless length", "utility repetition"),
    "no verbs": (lambda c: c.replace(" is a", ", a"), "arena", "", "utility dcscore repetition"),
    "guesses": (lambda c: c.replace(" is ", " may be "), "arena", "pointless", "utility dcscore repetition"),
    "alternatives": (
        lambda c: re.sub("red|blue|green", lambda found: HEDGED[found[0]], c),
        "utility dcscore arena",
        "length",
        "",
    ),
    "denied": (lambda c: c.replace(" is ", " is not "), "utility dcscore arena", "pointless", "repetition"),
    "another thing at each place": (
        lambda c: c + re.sub(r"At the", " At the", recoloured(c).split(".", 1)[1].rsplit(".", 2)[0]) + ".",
        "utility dcscore arena",
        "length",
        "pointless",
    ),
}


@pytest.mark.parametrize("name", WORSE)
def test_a_spoiled_caption_measures_worse(name):
    change, lower, higher, same = WORSE[name]
    good, bad = measured(), measured(change)
    for measure_name in lower.split():
        assert getattr(bad, measure_name) < getattr(good, measure_name) - 1e-3, measure_name
    for measure_name in higher.split():
        assert getattr(bad, measure_name) > getattr(good, measure_name) + 1e-3, measure_name
    for measure_name in same.split():
        assert getattr(bad, measure_name) == pytest.approx(getattr(good, measure_name), abs=0.02), measure_name


def test_references_are_perfect_and_nothing_is_worthless():
    best, nothing = measured(), measured(lambda caption: "")
    assert (best.utility, best.dcscore) == pytest.approx((100, 100)) and best.pointless == best.repetition == 0
    assert (nothing.arena, nothing.dcscore, nothing.length) == (-100, 0, 0)
    flawed = measured(of=lambda scene: flawed_caption(scene, 0))
    for name in ("utility", "dcscore", "arena", "b_capscore"):
        assert getattr(nothing, name) < getattr(flawed, name) < getattr(best, name)


def test_the_reader_understands_every_unit_of_a_reference():
    for record in RECORDS:
        account = read(record.reference)
        assert {each.fact for each in check(account, record.scene)} == set(reference_units(record.scene))
        assert account.restated == 0


@pytest.mark.parametrize(
    ("caption", "colours", "restated"),
    [
        ("A red circle is at the top left.", ["red"], 0),
        ("At the top left, a circle. It is red.", ["red"], 0),
        ("There is a circle. The circle is red. The red circle is at the upper left.", ["red"], 0),
        ("At the top left is a red circle. A red circle is at the top left.", ["red"], 3),
        ("At the top left is a red or blue circle.", ["red", "blue"], 0),
        ("At the top left is a red circle. It may be blue.", ["red"], 0),  # what is said plainly outweighs a guess
        ("At the top left may be a blue circle. At the top left is a red circle.", ["red"], 2),
        ("The circle is not red.", [], 0),
    ],
)
def test_what_the_reader_believes(caption, colours, restated):
    account = read(caption)
    [question] = [q for q in questions(SCENE) if (q.attribute, q.kind) == ("colour", "circle")]
    assert (answers(account, question), account.restated) == (colours, restated)


def test_utility_by_hand():
    """Count, background; of the circle kind, place, colour, size, texture; of the sign its word instead of texture."""
    assert len(questions(SCENE)) == 12
    right = ["count", "kind", "place", "colour"]  # of the circle; the size is wrong, and one guess in two is right
    caption = "There are two objects. At the top left is a small striped or dotted red circle."
    unknown = {"background": 3, "kind": 7, "place": 4, "colour": 6, "size": 2, "word": 4}
    expected = len(right) + 0 + 0.5 + sum(1 / n + 0.05 for n in unknown.values())
    assert utility(read(caption), SCENE) == pytest.approx(expected / 12)


def test_dcscore_by_hand():
    """Seven statements, six true: F1 of 6/7 and 6/11; with one sentence about nothing, 6/8 for all facts."""
    caption = "At the top left is a small striped red circle. There are two objects on a white background."
    account = read(caption)
    checked = check(account, SCENE)
    assert [each.fact for each in checked if not each.true] == [Fact(0, "size", "small")]
    oracle = len(reference_units(SCENE))
    f1 = 2 * 6 / (7 + oracle)
    assert dcscore(account, checked, SCENE) == pytest.approx(f1)
    account = read(f"{caption} {MOODS[0]}")
    assert dcscore(account, check(account, SCENE), SCENE) == pytest.approx((f1 + 2 * 6 / (8 + oracle)) / 2)


def test_the_arena_takes_a_majority():
    good = Impression(false=0, true=10, well_put=0.9)
    assert preferred(good, Impression(1, 12, 0.5)) == 1  # truer and better put, if less complete
    assert preferred(good, Impression(0, 12, 0.88)) == -1  # more complete, and put as well
    assert preferred(good, Impression(1, 12, 0.9)) == 0
    for caption in BASELINES.values():
        for record in RECORDS:
            own = impression(account := read(caption(record.scene)), check(account, record.scene))
            assert preferred(own, own) == 0


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(vocabulary()), max_size=60).map(" ".join)))
def test_any_text_can_be_measured(text):
    found = measure(RECORDS[:1], [text])
    bounds = {"arena": (-100, 100), "length": (0, 100)}
    for field in fields(found):
        low, high = bounds.get(field.name, (0, 100))
        assert low <= getattr(found, field.name) <= high, field.name


def test_only_b_capscore_comes_from_the_code_that_rewards():
    """The reader and all that is made of it import nothing of the rewards."""
    for file in Path(package.__file__).parent.glob("*.py"):
        names = [
            node.module for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
        ]
        assert file.name == "measures.py" or not any("rewards" in name for name in names), file
