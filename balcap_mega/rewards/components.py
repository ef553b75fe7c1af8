"""All components of a run's reward for a caption: what the judge finds, and the rewards of one's own beside it."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from balcap_mega.config.schema import RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.rewards.asked import AskedReward
from balcap_mega.rewards.judge import Judge, Judgement

NOT_JUDGED = Judgement(None, None, None, None, None)  # where no component is the judge's


@dataclass(frozen=True)
class Rewarded:
    """The judge's reply about one caption, and each component by its name, None where it is missing."""

    judgement: Judgement
    components: Mapping[str, float | None]


@dataclass(frozen=True)
class PendingRewards:
    """The components of one caption, on their way."""

    sources: Mapping[str, str]
    judgement: Future[Judgement] | None
    own: Mapping[str, Future[float | None]]

    def result(self, timeout: float) -> Rewarded:
        """Raises TimeoutError where the judge, or a reward, takes longer than that in seconds."""
        judgement = NOT_JUDGED if self.judgement is None else self.judgement.result(timeout)
        own = {name: future.result(timeout) for name, future in self.own.items()}
        found = {n: own[n] if n in own else getattr(judgement, source) for n, source in self.sources.items()}
        return Rewarded(judgement, found)


class Rewards:
    """Asks the judge and every reward of one's own about a caption, all at once.

    judge: None where no component is the judge's
    """

    def __init__(self, config: RewardConfig, judge: Judge | None, own: Mapping[str, AskedReward]):
        self.sources = {name: component.source for name, component in config.components.items()}
        self.judge, self.own = judge, own

    def submit(self, record: CaptionRecord, caption: str, *, quotes: bool = False) -> PendingRewards:
        """quotes: see `Judge`"""
        return PendingRewards(
            self.sources,
            None if self.judge is None else self.judge.submit(record, caption, quotes=quotes),
            {name: reward.submit(record, caption) for name, reward in self.own.items()},
        )

    def reasons(self) -> Counter[str]:
        """Why rewards of one's own were missing so far, each with the reward's name."""
        return Counter({f"{name}: {why}": n for name, reward in self.own.items() for why, n in reward.reasons.items()})

    def close(self) -> None:
        for part in (*([] if self.judge is None else [self.judge]), *self.own.values()):
            part.close()
