"""Where this process is: the phase of the step it is in, and when it last got on.

Written by the code that works, told to the other ranks by `balcap_mega.training.guard.watchdog`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Position:
    """phase: by name. step: from 0, None outside of steps. since: when it was entered, by `time.monotonic`.

    number: of entries and exits so far. All ranks run the same program, so the least number is the furthest behind.
    """

    phase: str
    step: int | None = None
    number: int = 0
    since: float = field(default_factory=time.monotonic)


class Progress:
    """`marks` counts every sign of getting on, so that one who watches sees whether there were any."""

    def __init__(self) -> None:
        self.position = Position("start")
        self.marks = 0

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Inside, the process is in phase `name`, of the surrounding phase's step unless told another.

        An exception leaves the position as it is: it tells where the process failed.
        """
        outer = self.position
        self._enter(name, outer.step if step is None else step)
        yield
        self._enter(outer.phase, outer.step)

    def mark(self) -> None:
        """Something was finished: a microbatch, a caption, a judgement, a tensor read or written."""
        self.marks += 1

    def _enter(self, phase: str, step: int | None) -> None:
        self.position = Position(phase, step, self.position.number + 1)
        self.mark()


progress = Progress()
"""This process's own."""
