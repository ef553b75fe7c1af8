"""Judging that runs while generation does: a caption goes to the judge the moment it is finished."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.rewards.collect import CaptionScore
from balcap_mega.rewards.judge import Judge, Judgement
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup


def count_words(text: str) -> float:
    return float(len(text.split()))


class Judging:
    """The judgements of one round of captions, by record and by number within the record's group.

    length: of a text, in the unit of the length gate
    timeout_seconds: the longest wait for one judgement after generation has ended
    """

    def __init__(
        self,
        judge: Judge,
        records: Mapping[int, CaptionRecord],
        length: Callable[[str], float] = count_words,
        timeout_seconds: float = 600,
    ):
        self.judge, self.records, self.length, self.timeout_seconds = judge, records, length, timeout_seconds
        self._futures: dict[tuple[int, int], Future[Judgement]] = {}

    def submit(self, record_index: int, number: int, rollout: Rollout) -> None:
        """Send one finished caption to the judge; returns at once."""
        self._futures[record_index, number] = self.judge.submit(self.records[record_index], rollout.text)

    def judgements(self, group: RolloutGroup) -> list[Judgement]:
        """Wait for a group's judgements, in the order of its rollouts."""
        return [self._wait(group.record_index, number) for number in range(len(group.rollouts))]

    def scores(self, groups: Sequence[RolloutGroup]) -> list[list[CaptionScore]]:
        """Wait for the judgements of these groups and put them beside the captions' lengths."""
        return [
            [
                CaptionScore(
                    **judgement.components(),
                    length=self.length(rollout.text),
                    reference_length=self.length(self.records[group.record_index].reference),
                )
                for rollout, judgement in zip(group.rollouts, self.judgements(group), strict=True)
            ]
            for group in groups
        ]

    def _wait(self, record_index: int, number: int) -> Judgement:
        try:
            return self._futures[record_index, number].result(timeout=self.timeout_seconds)
        except TimeoutError:
            record = self.records[record_index].id
            raise UserError(
                f"the judge has not answered about caption {number} of {record} for {self.timeout_seconds:.0f} s",
                remedy="check the judge endpoint, or raise rewards.endpoint.timeout_seconds",
            ) from None
