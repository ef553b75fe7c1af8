"""Utility: questions of a record, answered from a caption alone, and what the answers are worth."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest

from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.inputs import digest_of
from balcap_mega.data.jsonl import as_line, read_jsonl
from balcap_mega.data.questions import CANNOT_ANSWER, ChoiceQuestion
from balcap_mega.data.scenes import ScenesDataset, flawed_caption
from balcap_mega.data.scenes.questions import scene_questions
from balcap_mega.data.scenes.world import Scene, SceneObject
from balcap_mega.errors import UserError
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.rewards.scenes.answering import answer
from balcap_mega.rewards.scenes.discourse import follow
from balcap_mega.rewards.scenes.reading import read

COLOUR = {"question": "What colour is the cat?", "choices": ["Grey", "Black", "White"], "answer": "Black"}
ROW = {"image": "cat.jpg", "reference": "A black cat.", "questions": [COLOUR]}
JUDGE = SceneJudge(answers=True)
RECORDS = [ScenesDataset(40, 11, "eval", image_size=28)[index] for index in range(40)]


# Questions in data files


def test_a_record_carries_its_questions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "questions": []}) + "\n")
    row, none = read_jsonl(path)
    assert row.questions == (ChoiceQuestion("What colour is the cat?", ("Grey", "Black", "White"), "Black"),)
    assert none.questions == ()
    path.write_text(as_line(row) + "\n")
    assert read_jsonl(path) == [row]


def test_questions_belong_to_the_rows_that_a_run_began_with(tmp_path):
    (tmp_path / "cat.jpg").touch()
    question = ChoiceQuestion("Where?", ("Here", "There"), "Here")
    row = ImageRow("cat", "cat.jpg", "?", "A cat.")
    kinds = [None, (question,), (replace(question, answer="There"),)]
    digests = [ImageFileDataset([replace(row, questions=asked)], tmp_path).digest() for asked in kinds]
    assert len(set(digests)) == 3
    assert digests[0] == digest_of([("cat", "cat.jpg", "?", "A cat.", None)])  # as before rows could have any


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": "Green"}, "questions.0: answer 'Green' is none of the choices"),
        ({"choices": ["Black"]}, "questions.0.choices: List should have at least 2 items"),
        ({"choices": ["Black", "black "]}, "questions.0: choices hold 'Black' twice"),
        ({"choices": ["Black", CANNOT_ANSWER]}, "questions.0: choices hold 'Cannot answer from the caption' twice"),
        ({"choices": [f"{n}" for n in range(26)], "answer": "1"}, "questions.0.choices: List should have at most 25"),
        ({"question": " "}, "questions.0.question: blank"),
        ({"answers": "Black"}, "questions.0.answers: Extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_with_a_question_is_one_line(tmp_path, change, told):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "reference": "A."}) + "\n")
    with path.open("a") as file:
        file.write(json.dumps({**ROW, "questions": [{**COLOUR, **change}]}) + "\n")
    with pytest.raises(UserError) as error:
        read_jsonl(path)
    assert error.value.problem.startswith(f"{path}:2: record 'cat.jpg': {told}")
    assert '"choices": [two or more' in error.value.remedy and "\n" not in str(error.value)


def test_options_stand_in_an_order_of_record_and_question_alone():
    questions = [ChoiceQuestion(f"Which {n}?", ("a", "b", "c", "d"), "a") for n in range(200)]
    orders = [question.options("photo") for question in questions]
    assert orders == [replace(question).options("photo") for question in questions]
    assert all(sorted(order) == sorted((CANNOT_ANSWER, "a", "b", "c", "d")) for order in orders)
    assert orders != [question.options("another") for question in questions]
    places = [order.index("a") for order in orders]
    assert all(places.count(place) > 20 for place in range(5))  # the right one stands anywhere


# What answers are worth


def test_the_score_is_the_share_right_beyond_chance_and_a_guess_is_worth_nothing():
    question = ChoiceQuestion("?", ("a", "b", "c", "d"), "a")

    def utility(*chosen):
        return Judgement(None, None, None, None, None, tuple(map(question.credit, chosen))).utility

    assert utility("a", "a", "b", "a") == pytest.approx((3 / 4 - 1 / 4) / (1 - 1 / 4))
    assert utility("a", None, None, None) == 1 / 4  # of a model that does not guess, the share known
    guesser = random.Random(0)
    guesses = [guesser.choice(question.choices) for _ in range(30_000)]
    assert utility(*["a"] * 10_000, *guesses) == pytest.approx(1 / 4, abs=0.01)  # and the same of one that does
    assert utility("b", "c") == utility(None, None) == 0.0
    assert Judgement(None, None, None, None, None, ()).utility is None  # no question is no answer


# Scenes: by rules


def utility(caption, record):
    return JUDGE.judge(record, caption).utility


def test_utility_of_a_scene_grows_with_what_a_caption_tells():
    for record in RECORDS:
        sentences = record.reference.split(". ")
        partly = [". ".join(sentences[:count]) + "." for count in range(1, len(sentences))]
        scores = [utility(text, record) for text in ("", "There are some shapes.", *partly, record.reference)]
        assert scores == sorted(scores) and scores[:2] == [0, 0] and scores[-1] == 1
        assert 0 < scores[3] < 1  # overview and one object
    flawed = mean(utility(flawed_caption(record.scene, 0), record) for record in RECORDS)
    assert 0.3 < flawed < 0.7


def test_a_caption_of_another_scene_or_of_everything_is_of_no_use():
    others = [utility(other.reference, record) for record, other in pairwise(RECORDS)]
    assert mean(others) < 0.2
    everything = " ".join(
        f"There is a {colour} {kind} at the {place}."
        for kind in ("circle", "square", "star")
        for colour in ("red", "green", "blue")
        for place in ("top left", "top right")
    )
    assert mean(utility(everything, record) for record in RECORDS) < 0.1
    asserted = " ".join(f"{question.question} {question.answer}." for question in RECORDS[0].questions)
    assert utility(asserted, RECORDS[0]) < 0.5  # not the question's own words, but what is claimed


SCENE = Scene(
    "white",
    (
        SceneObject("circle", "red", "large", "striped", "top left"),
        SceneObject("square", "blue", "small", "plain", "top right"),
        SceneObject("sign", "green", "large", "plain", "bottom right", word="stop"),
    ),
)


@pytest.mark.parametrize(
    ("caption", "asked", "found"),
    [
        ("The image shows three objects on a grey background.", "How many objects", "three"),
        ("The image shows three objects on a grey background.", "What colour is the background", "grey"),
        ("There is a red circle at the top left.", "What is at the top left", "circle"),
        ("There is a small red circle.", "What colour is the circle", "red"),
        ("A blue circle is here. A red circle is there.", "What colour is the circle", None),
        ("There is a red circle. It is green.", "What colour is the circle", None),
        ("There is a sign that reads stop.", "What does the green sign read", None),  # a green one is not told of
        ("There is a green sign that reads go.", "What does the green sign read", "go"),
        ("Perhaps there is a red circle.", "Is there a circle", None),
        ("There are two objects. A red circle is left of a blue square.", "Is there a heart", "no"),
        ("There are three objects. A red circle is left of a blue square.", "Is there a heart", None),
    ],
)
def test_the_reader_knows_what_is_claimed_and_nothing_else(caption, asked, found):
    heart = replace(scene_questions(SCENE)[-2], question="Is there a heart?", about=(("kind", "heart"),))
    circle = replace(heart, question="Is there a circle?", about=(("kind", "circle"),))
    [question] = [q for q in (heart, circle, *scene_questions(SCENE)[:-3]) if q.question.startswith(asked)]
    assert answer(question, follow(read(caption))) == found


def test_how_two_things_stand_is_read_from_their_relation_or_their_places():
    record = RECORDS[0]
    question = next(q for q in record.questions if q.attribute in ("left of", "above"))
    one, other = (" ".join(value for _, value in named) for named in (question.about, question.other))
    places = {q.about: q.answer for q in record.questions if q.attribute == "place"}
    by_place = f"A {one} is at the {places[question.about]}. A {other} is at the {places[question.other]}."
    wrong = next(choice for choice in question.choices if choice != question.answer)
    for caption, found in (
        (f"A {one} is {question.answer} a {other}.", question.answer),
        (f"A {other} is {wrong} a {one}.", question.answer),
        (f"A {one} is {wrong} a {other}.", wrong),
        (by_place, question.answer),
        (f"{by_place} The {one} is {wrong} the {other}.", None),
        (f"There is a {one}.", None),
    ):
        assert answer(question, follow(read(caption))) == found, caption
