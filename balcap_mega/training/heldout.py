"""Held-out evaluation: one greedy caption an image, judged, before and after reinforcement learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from balcap_mega.data.records import CaptionRecord
from balcap_mega.rewards.collect import CaptionScore
from balcap_mega.rewards.judge import COMPONENTS, Judge, Judgement, b_capscore
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.training.judging import Judging


@dataclass(frozen=True)
class HeldOutCaption:
    """One image's caption with its judgement."""

    record_index: int
    caption: str
    judgement: Judgement
    score: CaptionScore


@dataclass(frozen=True)
class HeldOutResult:
    """Means over the held-out images; `captions` in the order of the records."""

    captions: tuple[HeldOutCaption, ...]

    @property
    def scores(self) -> dict[str, float]:
        """precision, recall, linguistic and their harmonic mean b_capscore on 0-100; length over reference length.

        A missing component is left out of its mean.
        """
        means = {}
        for name in COMPONENTS:
            values = [value for caption in self.captions if (value := getattr(caption.score, name)) is not None]
            means[name] = 100 * fmean(values)
        return {
            **means,
            "b_capscore": b_capscore(**means),
            "length_ratio": fmean(c.score.length / max(c.score.reference_length, 1.0) for c in self.captions),
        }


def evaluate_held_out(
    engine: RolloutEngine, judge: Judge, records: Mapping[int, CaptionRecord], length
) -> HeldOutResult:
    """Caption the records greedily and judge each caption. A collective: the ranks share the records out."""
    judging = Judging(judge, records, length)
    groups = engine.generate(records, greedy=True, on_finished=judging.submit)
    mine = [
        HeldOutCaption(group.record_index, group.rollouts[0].text, judgement, score)
        for group, [score] in zip(groups, judging.scores(groups), strict=True)
        for judgement in judging.judgements(group)
    ]
    return HeldOutResult(tuple(gather(mine)))


def sample_indices(captions: Sequence[HeldOutCaption], count: int) -> list[int]:
    """Which captions a report shows: the first ones, which no score has chosen."""
    return list(range(min(count, len(captions))))
