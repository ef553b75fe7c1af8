"""The judge interface: a caption goes in, a verdict on each assertion and three quality scores come out."""

from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from statistics import harmonic_mean, mean
from typing import Protocol

from balcap_mega.config.schema import JUDGED as COMPONENTS
from balcap_mega.data.records import CaptionRecord


class Verdict(StrEnum):
    """What the judge found about one assertion (BalCapRL, section on precision with pointability)."""

    VERIFIED = "verified"  # true of the image and pointable
    WRONG = "wrong"  # contradicted by the image
    NOT_POINTABLE = "not_pointable"  # points at nothing visible, true or not
    UNCHECKED = "unchecked"  # one of more assertions than a judge can check: it earns nothing


@dataclass(frozen=True)
class Assertion:
    """One atomic claim; `caption[start:stop]` is the text that makes it, empty where nobody asked which that is."""

    text: str
    start: int
    stop: int
    verdict: Verdict


@dataclass(frozen=True)
class Judgement:
    """A judge's reply about one caption. A field is None where that part of the judging failed, or was not asked for:
    missing, never 0.
    """

    assertions: tuple[Assertion, ...] | None
    covered: tuple[bool, ...] | None  # one per reference unit
    clarity: float | None  # the three quality scores lie in [0, 1]
    fluency: float | None
    coherency: float | None
    answers: tuple[float, ...] | None = None  # what each question of the record earned (`ChoiceQuestion.credit`)
    units: tuple[str, ...] | None = None  # the reference units in words, as `covered` has them

    @property
    def precision(self) -> float | None:
        """Assertions verified and pointable over all assertions; a caption that asserts nothing has 0."""
        if self.assertions is None:
            return None
        if not self.assertions:
            return 0.0
        return sum(a.verdict is Verdict.VERIFIED for a in self.assertions) / len(self.assertions)

    @property
    def recall(self) -> float | None:
        """Reference units covered over all reference units; None where the reference has no unit."""
        return mean(map(float, self.covered)) if self.covered else None

    @property
    def linguistic(self) -> float | None:
        scores = (self.clarity, self.fluency, self.coherency)
        return None if None in scores else mean(scores)

    @property
    def utility(self) -> float | None:
        """How far the record's questions can be answered from the caption alone (CapRL, arXiv 2509.22647), in [0, 1]:

            max(0, mean over questions of 1 if answered right, 0 if not answered, −1 / (choices − 1) if wrong)

        With k choices each, all of them answered, it is the share right beyond chance, (right − 1/k) / (1 − 1/k). An
        answer that is guessed earns 0 on average, as much as "cannot answer": the score is an estimate of the share
        known, whether the model that answers likes to guess or not. None where the record has no questions.
        """
        return max(0.0, mean(self.answers)) if self.answers else None

    def part(self, component: str) -> object | None:
        """What that component is computed from; None where it was not judged."""
        parts = {"precision": self.assertions, "recall": self.covered, "linguistic": self.linguistic}
        return {**parts, "utility": self.answers}[component]

    def components(self) -> dict[str, float | None]:
        """The three of b-CapScore."""
        return {name: getattr(self, name) for name in COMPONENTS}


def b_capscore(precision: float, recall: float, linguistic: float) -> float:
    """Harmonic mean of the three components, on their own scale (BalCapRL's evaluation score)."""
    return harmonic_mean((precision, recall, linguistic))


class Judge(Protocol):
    """Judges captions one by one, as they finish; a future that never raises for a failed reply (see `Judgement`).

    quotes: whether the places of the assertions in the caption will be shown, if a judge has to be asked for them
    """

    def submit(self, record: CaptionRecord, caption: str, *, quotes: bool = False) -> Future[Judgement]: ...

    def close(self) -> None: ...
