"""Asks a reward of one's own about many captions at once, and waits for none longer than its time limit."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Real
from queue import Empty, SimpleQueue

from balcap_mega.config.schema import ComponentConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.rewards.own import Reward, in_one_line

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    record: CaptionRecord
    caption: str
    deadline: float
    answer: Future[float | None] = field(default_factory=Future)
    started: bool = False


class AskedReward:
    """A `Reward` behind daemon threads: a call that never returns holds up neither the run nor its end.

    reasons: how many rewards are missing, by reason
    """

    def __init__(self, name: str, reward: Reward, config: ComponentConfig):
        self.name, self.reward, self.config = name, reward, config
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._limits: SimpleQueue[_Call | None] = SimpleQueue()
        for _ in range(config.concurrency):
            self._start(self._work)
        self._start(self._keep_time)

    def submit(self, record: CaptionRecord, caption: str) -> Future[float | None]:
        """A future that is done after `timeout_seconds` at the latest, and raises nothing."""
        call = _Call(record, caption, time.monotonic() + self.config.timeout_seconds)
        self._calls.put(call)
        self._limits.put(call)
        return call.answer

    def check(self) -> None:
        """Raises UserError where the reward's own check fails, or does not end."""
        check = getattr(self.reward, "check", None)
        if not callable(check):
            return
        outcome: SimpleQueue[str | None] = SimpleQueue()

        def ask() -> None:
            try:
                check()
                outcome.put(None)
            except BaseException as error:  # this thread has nobody else to tell
                outcome.put(f"its check failed: {in_one_line(error)}")

        self._start(ask)
        try:
            problem = outcome.get(timeout=self.config.timeout_seconds)
        except Empty:
            problem = f"its check has not ended for {self.config.timeout_seconds} s"
        if problem is not None:
            raise UserError(f"rewards.components.{self.name}: {problem}", remedy="mend it, or leave the component out")

    def close(self) -> None:
        for _ in range(self.config.concurrency):
            self._calls.put(None)
        self._limits.put(None)
        close = getattr(self.reward, "close", None)
        if callable(close):
            close()

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"reward {self.name}", daemon=True).start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if call.answer.done():
                continue
            call.started = True
            self._finish(call, *self._ask(call))
            if time.monotonic() > call.deadline:
                return  # another thread was started in place of this one

    def _ask(self, call: _Call) -> tuple[float | None, str, str]:
        """The reward; where it is missing, the reason, and what is told of it."""
        try:
            value = self.reward.score(call.record, call.caption)
        except BaseException as error:  # as above
            return None, type(error).__name__, f"it raised {in_one_line(error)}"
        if value is None:
            return None, "none given", ""
        if not isinstance(value, Real) or not 0 <= value <= 1:  # NaN neither
            return None, "no number in [0, 1]", f"it returned {str(value)[:100]!r}, which is no number in [0, 1]"
        return float(value), "", ""

    def _finish(self, call: _Call, value: float | None, reason: str, told: str) -> bool:
        """Whether this came first, the answer or the end of its time."""
        with self._lock:
            if call.answer.done():
                return False
            if reason:
                self.reasons[reason] += 1
            call.answer.set_result(value)
        if told:
            log.warning("reward %s of a caption of record %r is missing: %s", self.name, call.record.id, told)
        return True

    def _keep_time(self) -> None:
        """Every call has the same limit, so the oldest one's ends first."""
        while (call := self._limits.get()) is not None:
            try:
                call.answer.result(timeout=max(call.deadline - time.monotonic(), 0.0))
            except TimeoutError:
                late = self._finish(call, None, "timeout", f"no answer within {self.config.timeout_seconds} s")
                if late and call.started:
                    self._start(self._work)
