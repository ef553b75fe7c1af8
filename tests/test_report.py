"""The report is one page that needs nothing else, escapes what models write, and colours captions by assertion."""

import base64
import io
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.inputs import RunInputs
from balcap_mega.data.scenes import ScenesDataset, flawed_caption
from balcap_mega.rewards.collect import CaptionScore
from balcap_mega.rewards.judge import Assertion, Judgement, Verdict
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.heldout import HeldOutCaption, HeldOutResult
from balcap_mega.training.observe.charts import Curve, line_chart, stacked_chart
from balcap_mega.training.observe.metrics import MetricsLogger
from balcap_mega.training.observe.pages import score_words, spans
from balcap_mega.training.observe.report import charts, score_rows, write_report
from balcap_mega.training.observe.speed import TOKENS

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> \"'&amp; {{ 7 * 7 }}"
STEP = {
    **{f"reward/{name}": 0.5 for name in ("b_capscore", "precision", "recall", "linguistic", "gate_rate")},
    **{f"policy/{name}": 0.1 for name in ("entropy", "kl_old", "kl_reference", "clip_fraction", "gradient_norm")},
    "reward/length_ratio": 1.1, "rollout/logprob_difference_max": 1e-6, "rollout/logprob_difference": 1e-7,
    "seconds/<b>rollout": 1.0, "seconds/update": 2.0, "seconds/step": 3.0,
}  # fmt: skip
SCORES = {"precision": 50.0, "recall": 40.0, "linguistic": 60.0, "b_capscore": 48.6, "length_ratio": 1.4}
COUNTS = dict.fromkeys(SCORES, 256)
NO_VERDICT = Judgement(None, None, None, None, None)
STYLE_ONLY = Judgement(None, None, 0.5, 0.5, 0.5)
JUDGE = SceneJudge()


class Page(HTMLParser):
    """Every tag with its attributes, the visible text, and the text of each mark by its class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.marks, self._open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("mark", "span"):
            self._open.append(dict(attributes).get("class", ""))
        if tag == "mark":
            self.marks.append([self._open[-1], ""])

    def handle_endtag(self, tag):
        if tag in ("mark", "span"):
            self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] in list(Verdict):
            self.marks[-1][1] += data
        if "unseen" not in self._open:
            self.text += data


def held_out(dataset, caption, judge):
    captions = []
    for index in range(len(dataset)):
        text = caption(dataset[index])
        judgement = judge(dataset[index], text)
        captions.append(
            HeldOutCaption(index, text, judgement, CaptionScore(judgement.components(), length=1, reference_length=1))
        )
    return HeldOutResult(tuple(captions))


@pytest.fixture
def report(tmp_path):
    """`report(before, after, steps)` -> the page's text."""
    dataset = ScenesDataset(10, 0, "eval")
    config = RunConfig.model_validate({"output_dir": str(tmp_path), "model": {"tiny": "llava"}})
    folder = RunFolder(tmp_path)

    def report(before, after=lambda record: record.reference, steps=3, judge=JUDGE.judge):
        with MetricsLogger(tmp_path) as log:
            for step in range(steps):
                log(step, STEP)
        seconds = {"warmup": 61.0, "<i>": 5.0}
        folder.summary.write_text(
            json.dumps({"before": SCORES, "after": SCORES | {"recall": 30.0}, "seconds": seconds})
        )
        inputs = RunInputs.of(ScenesDataset(10, 0, "train"), dataset)
        captions = held_out(dataset, before, judge), held_out(dataset, after, judge)
        write_report(folder, config, inputs, *captions, dataset)
        return folder.report.read_text()

    return report


def test_one_self_contained_page(report):
    text = report(lambda record: flawed_caption(record.scene, 0))
    page = Page(text)
    assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#"))
    assert "@import" not in text and "url(http" not in text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 8 and all(picture["alt"] for picture in pictures)
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].partition(",")[2])))
    assert image.tobytes() == ScenesDataset(10, 0, "eval")[0].image.convert("RGB").tobytes()
    assert sum(tag == "svg" for tag, _ in page.tags) == 10
    for words in ("48.6", "−10.0", "Trainer against engine", "1:06", "tiny: llava"):
        assert words in page.text


def test_captions_are_coloured_as_judged(report):
    dataset = ScenesDataset(10, 0, "eval")
    page = Page(report(lambda record: flawed_caption(record.scene, 0)))
    legend, shown = page.marks[:4], page.marks[4:]
    assert {name for name, _ in legend} == {verdict.value for verdict in Verdict}
    expected = []
    for index in range(8):
        record = dataset[index]
        for caption in (flawed_caption(record.scene, 0), record.reference):
            cut = spans(caption, JUDGE.judge(record, caption))
            expected += [[span.verdict.value, span.text] for span in cut if span.verdict]
    assert shown == expected
    assert dataset[0].reference in page.text  # spans swallow no white space


def test_what_models_write_is_escaped(report):
    def judge(record, caption):
        assertions = (Assertion(HOSTILE, 0, 9, Verdict.WRONG), Assertion(HOSTILE, 0, 0, Verdict.VERIFIED))
        return Judgement(assertions, (True, False), 0.5, 0.5, 0.5)

    page = Page(report(lambda record: HOSTILE, lambda record: HOSTILE, judge=judge))
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in page.tags)
    assert page.text.count(HOSTILE) == 2 * 2 * 8  # as captions, and as assertions without a place in them
    assert "<b>rollout" in page.text and "<i> 0:05" in page.text


def test_no_verdicts_no_captions_no_steps(report):
    page = Page(report(lambda record: "", lambda record: "Some words.", steps=0, judge=lambda *_: STYLE_ONLY))
    assert page.text.count("No text") == 8
    assert page.text.count("not judged") == 2 * 8 * 2
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_speed_and_staleness_have_curves_where_every_step_has_them():
    def titles(*rows: dict, ahead: int = 0) -> set[str]:
        config = RunConfig.model_validate({"output_dir": "x", "model": {"tiny": "llava"}, "rollout": {"ahead": ahead}})
        return {chart.title for chart in charts([STEP | row | {"step": n} for n, row in enumerate(rows, 1)], config)}

    fast = {f"{TOKENS}/sample": 9.0, "rollout/staleness": 0.0, "rollout/staleness_max": 0.0}
    peak = {"mfu/update": 0.4, "mfu/step": 0.3}
    assert titles(fast, fast) - titles({}, fast) == {"Tokens a second and GPU"}
    assert titles(fast, ahead=1) - titles(fast) == {"Staleness"}
    assert titles(fast | peak) - titles(fast) == {"Model FLOPs utilisation"}


@given(
    st.text(max_size=40),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from(list(Verdict))), max_size=8),
)
def test_spans_cover_any_caption(caption, places):
    """Whatever the assertions' places, overlapping or not: nothing is lost, and a wrong one is never hidden."""
    places = [(min(a, b, len(caption)), min(max(a, b), len(caption)), verdict) for a, b, verdict in places]
    assertions = tuple(Assertion(str(n), a, b, verdict) for n, (a, b, verdict) in enumerate(places))
    cut = spans(caption, Judgement(assertions, None, None, None, None))
    assert "".join(span.text for span in cut) == caption
    shown = [span.verdict for span in cut for _ in span.text]
    for place, verdict in enumerate(shown):
        verdicts = {v for a, b, v in places if a <= place < b}
        order = (Verdict.WRONG, Verdict.NOT_POINTABLE, Verdict.UNCHECKED, Verdict.VERIFIED)
        assert verdict == next((v for v in order if v in verdicts), None)


def test_score_words():
    assertions = (Assertion("a", 0, 1, Verdict.VERIFIED), Assertion("b", 1, 2, Verdict.WRONG))
    judged = Judgement(assertions, (True, True, False), 1.0, 0.5, 0.6)
    assert score_words(judged, judged.components()) == [
        ("precision", "1 of 2"),
        ("recall", "2 of 3"),
        ("linguistic", "70"),
    ]
    assert score_words(NO_VERDICT, NO_VERDICT.components()) == [
        (name, "not judged") for name in ("precision", "recall", "linguistic")
    ]


def test_score_rows():
    after = SCORES | {"recall": 31.5, "length_ratio": 3.0}
    rows = {row["label"]: row for row in score_rows(SCORES, after, COUNTS, COUNTS)}
    assert (rows["recall"]["after"], rows["recall"]["change"]) == ("31.5", "−8.5")
    assert (rows["length ratio"]["change"], rows["length ratio"]["start"], rows["length ratio"]["stop"]) == (
        "+1.60",
        70.0,
        100.0,
    )


@pytest.mark.parametrize("count", [1, 2, 500])
def test_charts_take_the_pages_colours(count):
    steps = list(range(1, count + 1))
    svgs = [
        line_chart(steps, [Curve("a", steps), Curve("b", [0.0] * count)], band=(0, 1)),
        line_chart(steps, [Curve("a", [1e-6 * step for step in steps])], log=True),
        stacked_chart(steps, {"x": steps, "y": steps}),
    ]
    for svg in svgs:
        root = ElementTree.fromstring(svg)  # well formed
        assert "viewBox" in root.attrib and "width" not in root.attrib
        assert "var(--series-1)" in svg and "var(--soft)" in svg and "#0300" not in svg and "font-family" not in svg


@pytest.mark.parametrize(("value", "ends"), [(0.0, (0, 1)), (4.0, (0, 8)), (-4.0, (-8, 0))])
def test_a_value_that_never_changes_stands_on_an_axis_from_0(value, ends):
    root = ElementTree.fromstring(line_chart([101, 102, 103], [Curve("", [value] * 3)]))
    labels = [element.text.replace("−", "-") for element in root.iter() if element.tag.endswith("text")]
    numbers = [float(label) for label in labels if label]
    assert (min(numbers), max(number for number in numbers if number < 100)) == ends
