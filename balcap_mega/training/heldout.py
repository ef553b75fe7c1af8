"""Held-out evaluation: one greedy caption an image, judged, before and after reinforcement learning."""

import math
from collections.abc import Callable, Container, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import TypeAdapter, ValidationError

from balcap_mega.config.schema import JUDGED
from balcap_mega.errors import UserError
from balcap_mega.parallel.agreement import failing_together
from balcap_mega.rewards.balance import balance
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rewards.missing import refuse_missing
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.replicas import Replica
from balcap_mega.training.folder import write_text
from balcap_mega.training.judging import Judging
from balcap_mega.training.prompts import Prompts


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
    def names(self) -> tuple[str, ...]:
        """The components of the reward."""
        return tuple(self.captions[0].score.components)

    @property
    def scores(self) -> dict[str, float]:
        """Each component of the reward, and b_capscore where its three are there, on 0-100; length over reference.

        A caption without a component is left out of that component's mean, which is NaN if all are: see `counts`.
        """
        means = {}
        for name in self.names:
            values = self._values(name)
            means[name] = 100 * fmean(values) if values else math.nan
        return {
            **means,
            **balance(means),
            "length_ratio": fmean(c.score.length / max(c.score.reference_length, 1.0) for c in self.captions),
        }

    @property
    def counts(self) -> dict[str, int]:
        """Over how many captions each of `scores` is; b_capscore over as many as the fewest of its components."""
        judged = {name: len(self._values(name)) for name in self.names}
        balanced = {"b_capscore": min(judged[name] for name in JUDGED)} if set(JUDGED) <= set(judged) else {}
        return {**judged, **balanced, "length_ratio": len(self.captions)}

    def metrics(self) -> dict[str, float]:
        """`scores`, and the share of captions without each component, by the names of metrics.jsonl."""
        total = len(self.captions)
        missing = {f"{name}_missing": 1 - self.counts[name] / total for name in self.names}
        return {f"held_out/{name}": value for name, value in (self.scores | missing).items()}

    def _values(self, name: str) -> list[float]:
        return [value for caption in self.captions if (value := caption.score.components[name]) is not None]


_RESULT = TypeAdapter(HeldOutResult)


def evaluate_held_out(
    engine: RolloutEngine,
    replica: Replica,
    rewards: Rewards,
    records: Prompts,
    length: Callable[[str], float],
    timeout_seconds: float,
    max_missing_fraction: float,
    quotes: Container[int] = (),
    met: Callable[[], Mapping[str, int] | None] = lambda: None,
) -> HeldOutResult:
    """Caption the records greedily and judge each caption. A collective: the engines share the records out.

    met: why requests failed meanwhile, on any rank; called once, on all ranks
    What goes wrong on one rank is raised on all of them. Raises TooManyMissing by the rule that steps have too.
    """
    judging = Judging(rewards if replica.is_leader else None, records, length, timeout_seconds, quotes)
    with failing_together(engine.device), closing(records):
        groups = engine.greedy(records.of(replica, engine.render), on_finished=judging.submit)
        mine = [
            HeldOutCaption(group.seen.index, group.rollouts[0].text, judged.judgement, judged.score)
            for group, [judged] in judging.scored(groups)
        ]
    captions = replica.gather(mine)
    batch = build_reward_batch([[caption.score] for caption in captions])
    refuse_missing(batch, max_missing_fraction, met(), captions="the held-out captions")
    return HeldOutResult(tuple(captions))


def write_result(path: Path, result: HeldOutResult) -> None:
    write_text(path, _RESULT.dump_json(result, indent=1).decode())


def read_result(path: Path) -> HeldOutResult:
    """Raises UserError for a file that is not as `write_result` left it."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged ({error})", remedy="give another output_dir to start anew") from error
