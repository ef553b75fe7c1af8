"""Judging that runs while generation does: a caption goes to the judge the moment it is finished."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from balcap_mega.config.schema import RewardConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.parallel.progress import progress
from balcap_mega.rewards.collect import CaptionScore
from balcap_mega.rewards.components import PendingRewards, Rewarded, Rewards
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup


@dataclass(frozen=True)
class JudgedCaption:
    """What the judge said of one caption, and what it comes to."""

    judgement: Judgement
    score: CaptionScore


def patience(config: RewardConfig) -> float:
    """Seconds after which no reward can come any more: of the judge two questions in a row, each tried as often as it
    may be; of one's own, its time limit.
    """
    own = [component.timeout_seconds for component in config.components.values() if not component.judged]
    longest = max(
        (
            endpoint.timeout_seconds * (endpoint.max_retries + 1) * len(endpoint.addresses)
            for endpoint in config.endpoints().values()
        ),
        default=0,
    )
    return max([2 * longest, *own]) + 60.0


@dataclass(frozen=True)
class _Known:
    """The rewards of a caption that was judged before the run was interrupted, in the place of `PendingRewards`."""

    rewarded: Rewarded

    def result(self, timeout: float) -> Rewarded:
        return self.rewarded


class Judging:
    """The judgements of one round of captions, by the request's place and by number within its group.

    rewards: None on ranks that have no say (`Replica.is_leader`): there nothing is judged, and nothing is returned
    records: by place
    length:  of a text, in the unit of the length gate
    timeout_seconds: the longest wait for one judgement after generation has ended
    quotes:  the places for which a report will show where in a caption its assertions stand
    """

    def __init__(
        self,
        rewards: Rewards | None,
        records: Sequence[CaptionRecord],
        length: Callable[[str], float],
        timeout_seconds: float,
        quotes: Container[int] = (),
    ):
        self.quotes = quotes
        self.rewards, self.records, self.length, self.timeout_seconds = rewards, records, length, timeout_seconds
        self._pending: dict[tuple[int, int], PendingRewards | _Known] = {}
        self._reference_lengths: dict[int, float] = {}

    def submit(self, place: int, number: int, rollout: Rollout) -> None:
        """Send one finished caption to the judge; returns at once."""
        progress.mark()
        if self.rewards is not None:
            record = self.records[place]
            self._reference_length(place)  # while the record is at hand
            self._pending[place, number] = self.rewards.submit(record, rollout.text, quotes=place in self.quotes)

    def so_far(self, groups: Sequence[RolloutGroup]) -> list[tuple[Rewarded | None, ...]]:
        """The rewards of each caption as far as they are there now; None while one of them is missing."""
        return [tuple(self._now(group.place, number) for number in range(len(group.rollouts))) for group in groups]

    def go_on(self, group: RolloutGroup, rewarded: Sequence[Rewarded | None]) -> None:
        """Take up what `so_far` said in an earlier process, and ask about the other captions again."""
        for number, (rollout, known) in enumerate(zip(group.rollouts, rewarded, strict=True)):
            if known is None:
                self.submit(group.place, number, rollout)
            else:
                self._pending[group.place, number] = _Known(known)

    def scored(self, groups: Sequence[RolloutGroup]) -> list[tuple[RolloutGroup, list[JudgedCaption]]]:
        """Wait for the judgements of these groups and put them beside their captions."""
        if self.rewards is None:
            return []
        return [
            (group, [self._judged(group.place, number, rollout) for number, rollout in enumerate(group.rollouts)])
            for group in groups
        ]

    def _now(self, place: int, number: int) -> Rewarded | None:
        if self.rewards is None:
            return None
        try:
            rewarded = self._pending[place, number].result(timeout=0)
        except Exception:  # not there yet, or failed: `scored` will tell which
            return None
        return None if None in rewarded.components.values() else rewarded

    def _judged(self, place: int, number: int, rollout: Rollout) -> JudgedCaption:
        rewarded = self._wait(place, number)
        progress.mark()
        score = CaptionScore(
            components=rewarded.components,
            length=self.length(rollout.text),
            reference_length=self._reference_length(place),
        )
        return JudgedCaption(rewarded.judgement, score)

    def _reference_length(self, place: int) -> float:
        if place not in self._reference_lengths:
            self._reference_lengths[place] = self.length(self.records[place].reference)
        return self._reference_lengths[place]

    def _wait(self, place: int, number: int) -> Rewarded:
        try:
            return self._pending[place, number].result(timeout=self.timeout_seconds)
        except TimeoutError:
            record = self.records[place].id
            raise UserError(
                f"the judge has not answered about caption {number} of {record} for {self.timeout_seconds:.0f} s",
                remedy="check the judge endpoint, or raise rewards.endpoint.timeout_seconds",
            ) from None
