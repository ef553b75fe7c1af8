"""Which phase of which step this process is in, and a count of the work it has finished.

The code that does the work writes them. `balcap_mega.training.guard.watchdog` reads them and sends them to other ranks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Position:
    """phase:  its name
    step:   from 0; None outside of steps
    number: how many phases were entered and left so far. All ranks run the same program, so the rank with the smallest
            number is the furthest behind.
    since:  when the phase was entered, in seconds of `time.monotonic`
    """

    phase: str
    step: int | None = None
    number: int = 0
    since: float = field(default_factory=time.monotonic)


class Progress:
    """position: where the process is. marks: how many phases and pieces of work were begun or finished so far."""

    def __init__(self) -> None:
        self.position = Position("start")
        self.marks = 0

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Inside, the process is in phase `name`, and in `step` or, if None, in the surrounding phase's step.

        An exception leaves the position as it is, so that it says where the process failed.
        """
        outer = self.position
        self._enter(name, outer.step if step is None else step)
        yield
        self._enter(outer.phase, outer.step)

    def mark(self) -> None:
        """Count one finished piece of work: a microbatch, a caption, a judgement, a tensor read or written."""
        self.marks += 1

    def _enter(self, phase: str, step: int | None) -> None:
        self.position = Position(phase, step, self.position.number + 1)
        self.mark()


progress = Progress()
"""The position of this process."""
