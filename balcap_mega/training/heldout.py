"""Held-out evaluation: one greedy caption an image, judged, before and after reinforcement learning."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter, ValidationError

from balcap_mega.errors import UserError
from balcap_mega.rewards.collect import CaptionScore
from balcap_mega.rewards.judge import COMPONENTS, Judge, Judgement, b_capscore
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.replicas import Replica
from balcap_mega.training.batches import Prompts
from balcap_mega.training.folder import write_text
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


_RESULT = TypeAdapter(HeldOutResult)


def evaluate_held_out(
    engine: RolloutEngine,
    replica: Replica,
    judge: Judge,
    records: Prompts,
    length: Callable[[str], float],
    timeout_seconds: float,
) -> HeldOutResult:
    """Caption the records greedily and judge each caption. A collective: the engines share the records out."""
    judging = Judging(judge if replica.is_leader else None, records, length, timeout_seconds)
    mine = [
        HeldOutCaption(group.seen.index, group.rollouts[0].text, judged.judgement, judged.score)
        for group, [judged] in judging.scored(engine.greedy(records.of(replica), on_finished=judging.submit))
    ]
    return HeldOutResult(tuple(replica.gather(mine)))


def write_result(path: Path, result: HeldOutResult) -> None:
    write_text(path, _RESULT.dump_json(result, indent=1).decode())


def read_result(path: Path) -> HeldOutResult:
    """Raises UserError for a file that is not as `write_result` left it."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged ({error})", remedy="give another output_dir to start anew") from error
