"""A component of the `scenes` judge that is missing now and then, as a judge's reply over the network is."""

from random import Random
from typing import Literal

from balcap_mega.data.records import CaptionRecord
from balcap_mega.rewards.scenes import SceneJudge


class Unreliable:
    """`component` of the lenient judge; for the given share of captions it is missing, or 0 where `zero` is set.

    Which captions those are is a function of record, caption and component.
    """

    def __init__(self, component: Literal["precision", "recall", "linguistic"], share: float, zero: bool = False):
        self.component, self.share, self.zero = component, share, zero
        self._judge = SceneJudge(lenient=True)

    def score(self, record: CaptionRecord, caption: str) -> float | None:
        if Random(f"{record.id} {self.component} {caption}").random() < self.share:
            return 0.0 if self.zero else None
        return self._judge.judge(record, caption).components()[self.component]
