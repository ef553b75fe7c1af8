"""How many requests an address gets at once: more while its answers come quickly, fewer at once when it labours."""

import asyncio
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

FIRST_LIMIT = 8  # before anything is known of an address
REFUSED, SLOWER = 0.5, 0.75  # what is left of the limit after a refusal, and after answers that take longer
GROWN = 3.0  # times the usual duration, at which answers are late
RECENT = 0.05  # weight of a new duration in the mean that is compared with the usual one
FALLING, RISING = 0.1, 0.002  # weights in the usual one: what was quick once is expected for a while


@dataclass(frozen=True)
class Turn:
    """A request under way. `era` counts the limit's reductions up to its start: what began earlier says nothing new.

    beside: how many could be under way then
    """

    era: int
    beside: float


class Dismissed(Exception):
    """There will be no place for this request here."""


class AdaptiveLimit:
    """Additive increase, multiplicative decrease of the requests under way, never above `ceiling`.

    The limit starts low and grows by one an answer until the first sign of pressure, then by one a round of answers. It
    is halved by a refusal or a timeout, and lowered by a quarter when answers take `GROWN` times as long as usual for
    their kind; each at most once for the requests that were under way together. A server that shares its time over
    twice as many requests may take twice as long for each and is none the slower, so durations count for each request
    that could be beside it. Those who wait are served by priority, the lowest first, then in turn. Used on one event
    loop.
    """

    def __init__(self, ceiling: int):
        self.ceiling = ceiling
        self.limit = float(min(ceiling, FIRST_LIMIT))
        self.under_way = 0
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: by priority, then by arrival
        self._arrival = count()
        self._era = 0
        self._usual: dict[str, float] = {}
        self._recent = 1.0  # shares over their kind's usual one

    async def begin(self, priority: int = 0) -> Turn:
        """Wait for a place. Each must be followed by one `end`. Raises Dismissed when the line is dismissed."""
        if self.under_way >= int(self.limit) or self._waiting:
            place = asyncio.get_running_loop().create_future()
            heappush(self._waiting, (priority, next(self._arrival), place))
            try:
                await place  # whoever sets it has counted this request
            except asyncio.CancelledError:
                if place.done() and not place.cancelled() and place.exception() is None:
                    self._leave()
                raise
        else:
            self.under_way += 1
        return Turn(self._era, self.limit)

    def end(self, turn: Turn, kind: str = "", seconds: float | None = None, *, refused: bool = False) -> None:
        """The request is over: answered after `seconds`, refused for pressure (429, timeout), or failed otherwise."""
        if refused:
            self._lower(turn, REFUSED)
        elif seconds is not None:
            self._answered(turn, kind, seconds)
        self._leave()

    def dismiss(self) -> None:
        """Send everybody who waits elsewhere, and begin anew with what is known of the address."""
        while self._waiting:
            *_, place = heappop(self._waiting)
            if not place.done():
                place.set_exception(Dismissed())
        self.limit = float(min(self.ceiling, FIRST_LIMIT))
        self._begin_era()

    def _answered(self, turn: Turn, kind: str, seconds: float) -> None:
        if turn.era != self._era:
            return
        share = max(seconds, 1e-6) / turn.beside
        usual = self._usual.setdefault(kind, share)
        self._recent += RECENT * (share / usual - self._recent)
        self._usual[kind] = usual + (FALLING if share < usual else RISING) * (share - usual)
        if self._recent > GROWN:
            self._lower(turn, SLOWER)
        elif 2 * self.under_way >= self.limit:
            self.limit = min(self.limit + (1 / self.limit if self._era else 1), self.ceiling)

    def _lower(self, turn: Turn, factor: float) -> None:
        if turn.era == self._era:
            self.limit = max(self.limit * factor, 1.0)
            self._begin_era()

    def _begin_era(self) -> None:
        self._era += 1
        self._usual.clear()  # with fewer beside it a request has another share
        self._recent = 1.0

    def _leave(self) -> None:
        self.under_way -= 1
        while self._waiting and self.under_way < int(self.limit):
            *_, place = heappop(self._waiting)
            if not place.done():
                self.under_way += 1
                place.set_result(None)
