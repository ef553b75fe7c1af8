"""The scenes judge: verdicts with spans, coverage, style, and every hack that captioning under RL is known for."""

from dataclasses import replace
from itertools import product
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from balcap_mega.config.schema import RewardConfig
from balcap_mega.data.scenes import PROMPT, SceneRecord, ScenesDataset, flawed_caption, vocabulary
from balcap_mega.data.scenes.flawed import CLOSINGS, MOODS, PRAISES, SPECULATIONS
from balcap_mega.data.scenes.grammar import reference_caption, reference_units, unit_text
from balcap_mega.data.scenes.world import COLOURS, KINDS, PLACES, SIZES, Scene, SceneObject
from balcap_mega.rewards.factory import build_judge
from balcap_mega.rewards.judge import Verdict, b_capscore
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.rewards.scenes.reading import words_of

JUDGE = SceneJudge()
SCENE = Scene(
    "white",
    (
        SceneObject("circle", "red", "large", "striped", "top left"),
        SceneObject("square", "blue", "small", "plain", "top right"),
        SceneObject("sign", "green", "large", "plain", "bottom right", word="stop"),
    ),
)


def record_of(scene):
    units = tuple(unit_text(scene, unit) for unit in reference_units(scene))
    image = Image.new("RGB", (112, 112))  # the judge knows the scene and looks at no pixel
    return SceneRecord("test", image, PROMPT, reference_caption(scene), units, scene=scene)


RECORD = record_of(SCENE)
RECORDS = [record_of(ScenesDataset(60, seed=11, split="eval").scene(i)) for i in range(60)]


def judge(caption, record=RECORD):
    future = JUDGE.submit(record, caption)
    assert future.done()
    return future.result()


def verdicts(caption, record=RECORD):
    return {a.text: a.verdict for a in judge(caption, record).assertions}


def covered(caption, record=RECORD):
    return {unit for unit, yes in zip(record.units, judge(caption, record).covered) if yes}


def total(caption, record=RECORD):
    return sum(judge(caption, record).components().values())


def score(captions, records):
    """b-CapScore in [0, 1] of captions: the harmonic mean of the mean components."""
    judgements = [judge(caption, record) for caption, record in zip(captions, records)]
    return b_capscore(*(mean(j.components()[name] for j in judgements) for name in judgements[0].components()))


# Verdicts


def test_references_are_perfect():
    for record in RECORDS:
        judgement = judge(record.reference, record)
        assert judgement.precision == judgement.recall == 1.0
        assert judgement.linguistic >= 0.95


def test_each_attribute_is_an_assertion_with_its_span():
    caption = "A large dotted red circle is at the top right."
    judgement = judge(caption)
    assert [(a.text, a.verdict) for a in judgement.assertions] == [
        ("large", Verdict.VERIFIED),
        ("dotted", Verdict.WRONG),
        ("red", Verdict.VERIFIED),
        ("circle", Verdict.VERIFIED),
        ("at the top right", Verdict.WRONG),
    ]
    assert all(caption[a.start : a.stop] == a.text for a in judgement.assertions)
    assert covered(caption) == {
        "the red circle is large",
        "the circle at the top left is red",
        "there is a circle at the top left",
    }


@pytest.mark.parametrize(
    "caption, verified, wrong",
    [
        ("There are three objects on a white background.", {"three objects", "on a white background"}, set()),
        ("There are 2 shapes on a grey background.", set(), {"2 shapes", "on a grey background"}),
        ("The background is white.", {"The background is white"}, set()),
        ("A green sign reads stop.", {"green", "sign", "reads stop"}, set()),
        ('A green sign that reads "exit" is here.', {"green", "sign"}, {'reads "exit"'}),
        ("A circle is to the left of a square.", {"circle", "square", "to the left of"}, set()),
        ("The square is right of the circle.", {"square", "circle", "right of"}, set()),
        ("The square is below the circle.", {"square", "circle"}, {"below"}),
        ("The circle is bigger than the square.", {"circle", "square", "bigger than"}, set()),
        ("A circle is red and striped.", {"circle", "red", "striped"}, set()),
        ("There is a circle. It is blue.", {"circle"}, {"blue"}),
        ("At the top-right corner there is a tiny square.", {"At the top-right corner", "tiny", "square"}, set()),
        ("There are two circles.", set(), {"circles"}),
        ("A red heart is at the bottom left.", set(), {"red", "heart", "at the bottom left"}),
    ],
)
def test_readings(caption, verified, wrong):
    found = verdicts(caption)
    assert {text for text, verdict in found.items() if verdict is Verdict.VERIFIED} == verified
    assert {text for text, verdict in found.items() if verdict is Verdict.WRONG} == wrong


@pytest.mark.parametrize(
    "sentence", [*MOODS, *SPECULATIONS, *PRAISES, *CLOSINGS, PROMPT, "There is no red star.", "Hm?"]
)
def test_what_points_at_nothing_visible(sentence):
    judgement = judge(sentence)
    assert {a.verdict for a in judgement.assertions} == {Verdict.NOT_POINTABLE}
    assert not any(judgement.covered)


def test_two_of_a_kind_are_told_apart_by_place():
    scene = Scene(
        "black",
        (
            SceneObject("star", "red", "large", "plain", "top left"),
            SceneObject("star", "blue", "large", "plain", "bottom right"),
        ),
    )
    record = record_of(scene)
    assert judge("There are two stars. A red star is at the top left.", record).precision == 1.0
    assert (
        verdicts("A blue star is at the bottom right. A blue star is at the top left.", record)["blue"] is Verdict.WRONG
    )
    listed = "A blue star is at the bottom right. A red star is at the top left. The blue star is below the red star."
    assert judge(listed, record).precision == 1.0


def test_a_later_elaboration_counts_once_and_costs_nothing():
    caption = "A circle is at the top left. The circle is red. The red circle is large."
    judgement = judge(caption)
    assert [a.text for a in judgement.assertions] == ["circle", "at the top left", "red", "large"]
    assert judgement.precision == 1.0
    assert judgement.linguistic > 0.95


# Style


@pytest.mark.parametrize(
    "better, worse, quality",
    [
        ("A red circle is at the top left.", "A red circle at the top left.", "fluency"),
        ("A red circle is at the top left.", "A red circle is at the top left", "fluency"),
        ("A red circle is at the top left.", "a red circle is at the top left.", "fluency"),
        ("A red circle is at the top left.", "An red circle is at the top left.", "fluency"),
        ("There are two squares.", "There is two square.", "fluency"),
        ("A red circle is at the top left.", "A red red circle is is at the top left.", "fluency"),
        ("There is a circle. The sky is blue.", "There is a circle. Sky the blue is of.", "fluency"),
        ("There is a circle.", "There is a circle. It gives a sense of balance.", "clarity"),
        ("There is a circle. It is red.", "There is a circle. There is a circle.", "clarity"),
        ("There are two red squares. It is large.", "There are two red squares. The square is large.", "clarity"),
        (
            "A red circle is at the top left. A square is at the top right.",
            "A square is at the top right. A red circle is at the top left.",
            "coherency",
        ),
        ("There are three objects. There is a circle.", "There is a circle. There are three objects.", "coherency"),
        ("There is a circle. The circle is red.", "The circle is red.", "coherency"),
        ("There is a circle. It is red.", "There is a circle. It is red. It is blue.", "coherency"),
        ("There is a circle.", "There is a circle. I like it.", "coherency"),
    ],
)  # fmt: skip
def test_style_prefers(better, worse, quality):
    assert getattr(judge(better), quality) > getattr(judge(worse), quality)


def test_style_ignores_truth():
    false = "The image shows four objects on a black background. A small blue heart is at the top left."
    true = "The image shows three objects on a white background. A large red circle is at the top left."
    assert judge(false).linguistic == judge(true).linguistic == 1.0


# Hacks: each is judged alone, and on top of an honest, imperfect caption


def honest(record):
    """One thing left out, one colour mistaken."""
    scene = record.scene
    first, *rest = scene.objects
    mistaken = replace(first, colour=COLOURS[COLOURS.index(first.colour) - 1])
    sentences = reference_caption(replace(scene, objects=(mistaken, *rest))).split(". ")
    del sentences[2]
    return ". ".join(sentences)


def every_pair(record):
    return " ".join(f"There is a {colour} {kind}." for colour, kind in product(COLOURS, KINDS))


def everything_everywhere(record):
    return " ".join(f"A {colour} {kind} is at the {place}." for place, kind, colour in product(PLACES, KINDS, COLOURS))


ALONE = {
    "self-praise": lambda record: " ".join(PRAISES),
    "praise": lambda record: "This is an accurate, detailed description. Every true detail of the image is covered.",
    "closing commentary": lambda record: " ".join(CLOSINGS),
    "mood": lambda record: " ".join(MOODS),
    "speculation": lambda record: " ".join(SPECULATIONS),
    "empty": lambda record: "",
    "white space": lambda record: " \n\t ",
    "punctuation": lambda record: "... !!! ,,, ???",
    "one fact": lambda record: f"There is a {record.scene.objects[0].kind}.",
    "one fact, repeated": lambda record: " ".join([f"There is a {record.scene.objects[0].kind}."] * 12),
    "bag of pairs": every_pair,
    "bag of everything": everything_everywhere,
    "prompt": lambda record: PROMPT,
    "word salad": lambda record: " ".join(vocabulary()),
    "salad of the reference": lambda record: " ".join(sorted(record.reference.replace(".", "").split())),
    "keyword list": lambda record: ", ".join([*COLOURS, *SIZES, *KINDS, *PLACES]),
    "hedging": lambda record: " ".join(
        f"A {' or '.join(COLOURS)} {' or '.join(KINDS)} is at the {place}." for place in PLACES
    ),
    "maybe": lambda record: " ".join(f"Maybe a red circle is at the {place}." for place in PLACES),
    "inflated numbers": lambda record: "There are " + " and ".join(f"nine {kind}s" for kind in KINDS[:4]) + ".",
    "denials": lambda record: " ".join(f"There is no {colour} {kind}." for colour, kind in product(COLOURS, KINDS)),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_hack_alone_scores_far_below_an_honest_caption(name):
    fair = score([honest(record) for record in RECORDS], RECORDS)
    hacked = score([ALONE[name](record) for record in RECORDS], RECORDS)
    assert 0.6 < fair < 0.95
    assert hacked < 0.5 * fair, f"{name}: {hacked:.2f} against {fair:.2f}"


def reworded(caption):
    return caption.replace("A ", "There is a ").replace(" is at the", " at the")


def all_true_relations(record):
    scene = record.scene
    return " ".join(
        f"The {a.colour} {a.kind} is {'left of' if a.column < b.column else 'above'} the {b.colour} {b.kind}."
        for a in scene.objects
        for b in scene.objects
        if a.column < b.column or a.row < b.row
    )


def appended(hack):
    return lambda record, caption: f"{caption} {hack(record)}"


ADDS_NOTHING_OR_NEWS = ("empty", "white space", "one fact")
ON_TOP = {name: appended(hack) for name, hack in ALONE.items() if name not in ADDS_NOTHING_OR_NEWS}
ON_TOP |= {
    "repeats itself": lambda record, caption: f"{caption} {caption}",
    "repeats itself in other words": lambda record, caption: f"{caption} {reworded(caption)}",
    "repeats its first sentence": lambda record, caption: f"{caption} {caption.split('. ')[0].rstrip('.')}.",
    "closes": lambda record, caption: f"{caption} {CLOSINGS[0]}",
    "praises": lambda record, caption: f"{caption} {PRAISES[0]}",
    "praises first": lambda record, caption: f"{PRAISES[0]} {caption}",
    "parrots first": lambda record, caption: f"{PROMPT} {caption}",
    "praises each object": lambda record, caption: caption.replace(" is at", " is clearly and accurately at"),
    "hedges": lambda record, caption: caption.replace(" red ", " red or blue ").replace("A large", "A large or small"),
    "hedges all": lambda record, caption: caption.replace("A ", "Maybe a "),
    "keyword list": lambda record, caption: caption.replace(" is at the", ",").replace("A ", "").replace(".", ","),
    "no punctuation": lambda record, caption: caption.replace(".", ""),
    "lower case": lambda record, caption: caption.lower(),
    "one vast sentence": lambda record, caption: caption.replace(". ", " and "),
    "two counts": lambda record, caption: "There are two objects. There are four objects. " + caption,
    "inflates": lambda record, caption: caption.replace("A ", "Nine "),
    "all relations": lambda record, caption: f"{caption} {all_true_relations(record)}",
    "another colour at each place": lambda record, caption: caption + " " + " ".join(
        f"A {colour} {item.kind} is at the {item.place}." for item in record.scene.objects for colour in COLOURS[:3]
    ),
    "denies": lambda record, caption: f"{caption} There is no {record.scene.objects[0].kind}.",
}  # fmt: skip


@pytest.mark.parametrize("name", ON_TOP)
def test_no_hack_improves_an_honest_caption(name):
    for record in RECORDS:
        fair = honest(record)
        hacked = ON_TOP[name](record, fair)
        if hacked != fair:
            assert total(hacked, record) < total(fair, record), hacked


@pytest.mark.parametrize("name", sorted(set(ON_TOP) - {"all relations"}))  # which may tell truths that were left out
def test_no_hack_improves_a_flawed_captioner(name):
    fair = [flawed_caption(record.scene, 5) for record in RECORDS]
    hacked = [ON_TOP[name](record, caption) for record, caption in zip(RECORDS, fair)]
    assert mean(map(total, hacked, RECORDS)) < mean(map(total, fair, RECORDS))


def test_repetition_never_raises_precision():
    for record in RECORDS:
        caption = honest(record)
        sentences = [f"{part.rstrip('.')}." for part in caption.split(". ")]
        for sentence in sentences:
            repeated = f"{caption} {sentence}"
            assert judge(repeated, record).precision <= judge(caption, record).precision
            assert judge(repeated, record).linguistic < judge(caption, record).linguistic


def test_contradictions_cover_nothing():
    assert covered("A red circle is at the top left.") > covered("A red circle is at the top left. The circle is blue.")
    assert not covered("A red circle is at the top left. A red square is at the top left.")
    assert not covered("There are three objects. There are four objects.")
    assert not covered(every_pair(RECORD))
    assert not covered("A red or blue circle is at the top left.")


# Any text

IDLE = "calm very detailed lovely overall dog tree accurate or no is the and of"
STRANGE = ("or", "no", "9", "999", "\n", "I", "é", "—", "left", "...", "٣")
TEXTS = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from([*vocabulary(), *STRANGE]), max_size=80).map(" ".join),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_gets_a_sound_judgement(text):
    judgement = judge(text)
    assert judgement == judge(text)
    assert len(judgement.covered) == len(RECORD.units)
    for value in (judgement.clarity, judgement.fluency, judgement.coherency, *judgement.components().values()):
        assert 0.0 <= value <= 1.0
    for assertion in judgement.assertions:
        assert 0 <= assertion.start < assertion.stop <= len(text)
        assert text[assertion.start : assertion.stop] == assertion.text
    starts = [assertion.start for assertion in judgement.assertions]
    assert len(set(starts)) == len(starts)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(words_of(IDLE))), min_size=1, max_size=20))
def test_words_without_a_visible_claim_never_raise_the_reward(words):
    caption = honest(RECORD)
    assert total(f"{caption} {' '.join(words).capitalize()}.") < total(caption)


def test_a_long_text_is_judged_quickly():
    assert judge(everything_everywhere(RECORD) * 5).precision < 0.1


def test_without_pointability_moods_and_praise_pass_as_true():
    caption = (
        "A red star is at the top left. The scene feels calm and cheerful. Every detail is described with great care."
    )
    strict, lenient = (SceneJudge(pointability).judge(RECORD, caption).assertions for pointability in (True, False))
    assert Verdict.NOT_POINTABLE in {assertion.verdict for assertion in strict}
    for one, other in zip(strict, lenient, strict=True):
        verdict = Verdict.VERIFIED if one.verdict is Verdict.NOT_POINTABLE else one.verdict
        assert (other.text, other.verdict) == (one.text, verdict)
    assert Verdict.WRONG in {assertion.verdict for assertion in lenient}  # what is false stays so
    assert build_judge(RewardConfig(pointability=False)).judge(RECORD, caption).assertions == lenient


def test_a_lenient_reading_takes_any_statement_but_a_denial():
    strict, lenient = SceneJudge(), build_judge(RewardConfig(reading="lenient"))
    red = RECORD.units.index("the circle at the top left is red")

    def covers(judge, caption):
        return judge.judge(RECORD, caption).covered[red]

    for caption in (
        "At the top left may be a red circle.",
        "At the top left is a blue circle or a red circle.",
        "A red circle is at the top left. The circle is blue.",
        "A red circle is at the top left. A red square is at the top left.",
    ):
        assert covers(lenient, caption) and not covers(strict, caption), caption
    assert not covers(lenient, "At the top left is no red circle.") and not covers(lenient, "The circle is blue.")
    for record in RECORDS:  # what is said plainly and once is judged alike
        assert lenient.judge(record, record.reference) == strict.judge(record, record.reference)
    wrong = lenient.judge(RECORD, "At the top left may be a blue circle.").assertions
    assert Verdict.WRONG in {assertion.verdict for assertion in wrong}
