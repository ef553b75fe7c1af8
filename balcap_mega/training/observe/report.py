"""report.html: what a run did, on one self-contained page with curves, scores and captions before and after."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from PIL import Image

from balcap_mega.config.load import dump_config
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.inputs import RunInputs
from balcap_mega.data.records import CaptionDataset
from balcap_mega.rewards.judge import Judgement, Verdict
from balcap_mega.training.folder import RunFolder, write_text
from balcap_mega.training.heldout import HeldOutCaption, HeldOutResult
from balcap_mega.training.observe.charts import SERIES, Curve, line_chart, stacked_chart
from balcap_mega.training.observe.console import captions_counted, clock, label, run_facts
from balcap_mega.training.observe.metrics import read_metrics
from balcap_mega.training.observe.speed import TOKENS

SAMPLES = 8  # the first held-out images, which no score has chosen
IMAGE_SIDE = 448  # pixels that a longer side is shrunk to
# Where assertions overlap, the first one shows.
PRECEDENCE = (Verdict.WRONG, Verdict.NOT_POINTABLE, Verdict.UNCHECKED, Verdict.VERIFIED)
WORDS = {
    Verdict.VERIFIED: "verified",
    Verdict.WRONG: "wrong",
    Verdict.NOT_POINTABLE: "not pointable",
    Verdict.UNCHECKED: "not checked",
}
VERDICTS = [(verdict.value, WORDS[verdict]) for verdict in reversed(PRECEDENCE)]


@dataclass(frozen=True)
class Span:
    """A stretch of a caption and the verdict on the assertion that makes it; None where nothing is asserted."""

    text: str
    verdict: Verdict | None = None
    assertion: str = ""

    @property
    def word(self) -> str:
        return "" if self.verdict is None else WORDS[self.verdict]


@dataclass(frozen=True)
class Unit:
    """A fact of the reference, and whether the caption states it."""

    text: str
    covered: bool


@dataclass(frozen=True)
class ShownCaption:
    """A caption as a page shows it. scores: (name, value in words)"""

    title: str
    spans: Sequence[Span]
    unplaced: Sequence[Span]
    units: Sequence[Unit]
    scores: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, title: str, caption: str, judgement: Judgement, scores: Sequence[tuple[str, str]]) -> "ShownCaption":
        return cls(title, spans(caption, judgement), unplaced(judgement), units(judgement), scores)


@dataclass(frozen=True)
class Chart:
    """A figure of the page; `svg` is markup of our own making."""

    title: str
    note: str
    legend: tuple[str, ...]
    svg: Markup


def write_report(
    folder: RunFolder,
    config: RunConfig,
    inputs: RunInputs,
    before: HeldOutResult,
    after: HeldOutResult,
    dataset: CaptionDataset,
    changes: str | None = None,
) -> None:
    """Write `folder.report` from the folder's summary.json and metrics.jsonl, and the first captions of `dataset`.

    changes: the page beside it that shows how those captions changed over the run
    """
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    page = template("report_template.html").render(
        changes=changes,
        name=folder.root.resolve().name,
        facts=run_facts(config, inputs),
        score=summary["after"].get("b_capscore"),
        score_before=summary["before"].get("b_capscore"),
        gate=config.algorithm.gate,
        scores=score_rows(summary["before"], summary["after"], before.counts, after.counts),
        eval_size=len(before.captions),
        charts=charts(read_metrics(folder.root), config),
        samples=[
            sample(old, new, dataset)
            for old, new in zip(before.captions[:SAMPLES], after.captions[:SAMPLES], strict=True)
        ],
        verdicts=VERDICTS,
        phases=[(name, clock(seconds), seconds) for name, seconds in summary["seconds"].items()],
        total=clock(sum(summary["seconds"].values())),
        total_seconds=max(sum(summary["seconds"].values()), 1e-9),
        resolved=dump_config(config),
    )
    write_text(folder.report, page)


def template(name: str) -> Template:
    """A page of this package; what a model or a user wrote is escaped in it."""
    return Environment(
        loader=PackageLoader("balcap_mega.training.observe", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def score_rows(
    before: Mapping[str, float],
    after: Mapping[str, float],
    counts_before: Mapping[str, int],
    counts_after: Mapping[str, int],
) -> list[dict[str, object]]:
    """Held-out scores as the table shows them, with the number of captions that each is over.

    `start` and `stop` place the change on a track from 0 to 100; a score over no caption stands at 0.
    """
    rows = []
    for key in after:
        form, scale = (".2f", 50.0) if key == "length_ratio" else (".1f", 1.0)  # a length ratio's track ends at 2
        start, stop = (min(max(0.0, scale * value), 100.0) for value in (before[key], after[key]))
        rows.append(
            {
                "label": label(key),
                "main": key == "b_capscore",
                "ratio": key == "length_ratio",
                "before": format(before[key], form),
                "after": format(after[key], form),
                "change": format(after[key] - before[key], f"+{form}").replace("-", "−"),
                "captions": captions_counted([counts_before[key], counts_after[key]]),
                "start": start,
                "stop": stop,
            }
        )
    return rows


def charts(rows: Sequence[Mapping[str, float]], config: RunConfig) -> list[Chart]:
    """The curves of a run; none when no step was taken."""
    if not rows:
        return []
    steps = [int(row["step"]) for row in rows]

    def curve(name: str, key: str, scale: float = 1.0) -> Curve:
        return Curve(name, [scale * row[key] for row in rows])

    def chart(title: str, note: str, *curves: Curve, **options) -> Chart:
        legend = tuple(curve.label for curve in curves) if len(curves) > 1 else ()
        return Chart(title, note, legend, Markup(line_chart(steps, curves, **options)))

    def known(key: str) -> bool:
        """Whether every step has it: a GPU's peak may not be known, and older versions did not count all of it."""
        return all(key in row for row in rows)

    gate = config.algorithm.gate
    kl, other = ("kl_reference", "reference") if config.algorithm.kl_weight else ("kl_old", "sampling")
    mismatch = [curve("largest", "rollout/logprob_difference_max"), curve("mean", "rollout/logprob_difference")]
    phases = {
        key.removeprefix("seconds/"): [row[key] for row in rows]
        for key in rows[-1]
        if key.startswith("seconds/") and key != "seconds/step"
    }
    longest = dict(sorted(phases.items(), key=lambda item: -sum(item[1]))[: len(SERIES)])
    return [
        *(
            [chart("b-CapScore", "Of the sampled training captions, 0–100.", curve("", "reward/b_capscore", 100))]
            if "reward/b_capscore" in rows[-1]
            else []
        ),
        chart(
            "Reward components",
            "As judged, before the length gate, 0–100.",
            *(curve(name, f"reward/{name}", 100) for name in config.rewards.components),
        ),
        chart(
            "Length ratio",
            f"Caption over reference, in {gate.unit}. The gate passes the shaded range.",
            curve("", "reward/length_ratio"),
            band=(gate.lower, gate.upper),
        ),
        chart("Gate rate", "Captions outside the range, percent.", curve("", "reward/gate_rate", 100)),
        chart("Entropy", "Of the policy, in nats a token.", curve("", "policy/entropy")),
        chart("KL divergence", f"From the {other} policy, in nats a token.", curve("", f"policy/{kl}")),
        chart("Clipped tokens", "Without gradient, percent.", curve("", "policy/clip_fraction", 100)),
        chart(
            "Trainer against engine",
            "Absolute difference of their logprobs of the same tokens.",
            *mismatch,
            log=all(value > 0 for line in mismatch for value in line.values),
        ),
        chart("Gradient norm", "Before clipping.", curve("", "policy/gradient_norm")),
        Chart("Time", "Seconds a step, by phase.", tuple(longest), Markup(stacked_chart(steps, longest))),
        *(
            [
                chart(
                    "Tokens a second and GPU",
                    "Over the whole step: captions, and their prompts once a caption.",
                    curve("", f"{TOKENS}/sample"),
                )
            ]
            if known(f"{TOKENS}/sample")
            else []
        ),
        *(
            [
                chart(
                    "Model FLOPs utilisation",
                    "Percent of the GPUs' peak, over the update and over the whole step.",
                    curve("update", "mfu/update", 100),
                    curve("step", "mfu/step", 100),
                )
            ]
            if known("mfu/update")
            else []
        ),
    ]


def sample(before: HeldOutCaption, after: HeldOutCaption, dataset: CaptionDataset) -> dict[str, object]:
    """One image's card: the picture inline, the reference, and both captions in spans with their scores."""
    record = dataset[before.record_index]
    return {
        "image": data_url(record.image),
        "reference": record.reference,
        "captions": [held_out("Before", before), held_out("After", after)],
    }


def held_out(title: str, caption: HeldOutCaption) -> ShownCaption:
    words = score_words(caption.judgement, caption.score.components)
    return ShownCaption.of(title, caption.caption, caption.judgement, words)


def spans(caption: str, judgement: Judgement) -> list[Span]:
    """Cut a caption at the bounds of its assertions; the spans' texts joined are the caption."""
    owner: list[int | None] = [None] * len(caption)
    assertions = judgement.assertions or ()
    for verdict in reversed(PRECEDENCE):
        for number, assertion in enumerate(assertions):
            if assertion.verdict is verdict:
                length = len(owner[assertion.start : assertion.stop])
                owner[assertion.start : assertion.stop] = [number] * length
    cut = []
    for number, places in groupby(range(len(caption)), key=lambda place: owner[place]):
        first, *rest = places
        text = caption[first : first + 1 + len(rest)]
        cut.append(Span(text) if number is None else Span(text, assertions[number].verdict, assertions[number].text))
    return cut


def unplaced(judgement: Judgement) -> list[Span]:
    """Assertions that the judge found but could not point to in the caption's text."""
    return [Span(a.text, a.verdict, a.text) for a in judgement.assertions or () if a.start == a.stop]


def units(judgement: Judgement) -> list[Unit]:
    """Nothing where they were not judged, or stand there without their texts, as in old files."""
    if not judgement.covered or judgement.units is None:
        return []
    return [Unit(text, covered) for text, covered in zip(judgement.units, judgement.covered, strict=True)]


def score_words(judgement: Judgement, components: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """A caption's scores, (name of the component, what it comes to)."""
    counted = {}
    if judgement.assertions is not None:
        verified = sum(assertion.verdict is Verdict.VERIFIED for assertion in judgement.assertions)
        counted["precision"] = f"{verified} of {len(judgement.assertions)}"
    if judgement.covered:
        counted["recall"] = f"{sum(judgement.covered)} of {len(judgement.covered)}"
    return [
        (name, "not judged" if value is None else counted.get(name, f"{100 * value:.0f}"))
        for name, value in components.items()
    ]


def data_url(image: Image.Image, side: int = IMAGE_SIDE) -> str:
    """A picture as a PNG within the page, its longer side at most that."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
