"""What the report and the pages of captions share: a caption with the judge's findings marked in it, its picture."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, Template
from PIL import Image

from balcap_mega.rewards.judge import Judgement, Verdict
from balcap_mega.training.heldout import HeldOutCaption

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

    @classmethod
    def held_out(cls, title: str, caption: HeldOutCaption) -> "ShownCaption":
        words = score_words(caption.judgement, caption.score.components)
        return cls.of(title, caption.caption, caption.judgement, words)


def template(name: str) -> Template:
    """A page of this package; what a model or a user wrote is escaped in it."""
    return Environment(
        loader=PackageLoader("balcap_mega.training.observe", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


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
