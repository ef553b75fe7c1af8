"""The arena: which of two captions someone who sees the picture would rather have, against three fixed captioners."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from balcap_mega.data.scenes.flawed import flawed_caption
from balcap_mega.data.scenes.grammar import NUMBERS, article, reference_caption
from balcap_mega.data.scenes.world import Scene
from balcap_mega.evaluation.scenes.account import Account
from balcap_mega.evaluation.scenes.reader import read
from balcap_mega.evaluation.scenes.truth import Checked, check

CLEARLY = 0.05  # by which one share of well-put words must exceed another


@dataclass(frozen=True)
class Impression:
    """false, true: things said that are not so, and that are so; a guess counts half. well_put: the share of the words
    that stand in whole sentences, tell something new, and name something visible."""

    false: float
    true: float
    well_put: float


def impression(account: Account, checked: Sequence[Checked]) -> Impression:
    weights = [(0.5 if each.statement.guess else 1.0, each.true) for each in checked]
    words = sum(sentence.words for sentence in account.sentences)
    good = sum(s.words - s.idle for s in account.sentences if s.whole and s.news)
    fresh = len(checked) / max(len(checked) + account.restated, 1)
    return Impression(
        false=sum(weight for weight, true in weights if not true),
        true=sum(weight for weight, true in weights if true),
        well_put=good / max(words, 1) * fresh,
    )


def preferred(one: Impression, other: Impression) -> int:
    """1: the first, -1: the second, 0: a tie. By majority of three questions: which says less that is false, which says
    more that is true, which is better put."""
    votes = [
        _sign(other.false - one.false),
        _sign(one.true - other.true),
        _sign(one.well_put - other.well_put, CLEARLY),
    ]
    return _sign(sum(votes))


def _sign(difference: float, least: float = 0.0) -> int:
    return (difference > least) - (difference < -least)


def brief(scene: Scene) -> str:
    """Colour and kind of each object, in true and plain sentences, and no more."""
    things = [f"{article(item.colour)} {item.colour} {item.kind}" for item in scene.objects]
    return " ".join([f"The image shows {NUMBERS[len(things)]} objects.", *(f"There is {thing}." for thing in things)])


BASELINES: dict[str, Callable[[Scene], str]] = {
    "reference": reference_caption,
    "flawed": lambda scene: flawed_caption(scene, "arena"),
    "brief": brief,
}


def arena(scenes: Sequence[Scene], impressions: Sequence[Impression]) -> float:
    """CapArena-Auto's score: 100 · (wins − losses) / battles against each baseline, and the mean of the three."""
    results = [
        preferred(own, impression(account := read(caption(scene)), check(account, scene)))
        for caption in BASELINES.values()
        for scene, own in zip(scenes, impressions, strict=True)
    ]
    return 100 * fmean(results)
