"""Where the host stops until the device has an answer for it: the line of ours that asks, and the line that waits."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent
_BETWEEN = (str(Path(__file__).parent), str(PACKAGE / "parallel" / "cpu_redirects.py"))
"""Files that only pass a call on."""


@dataclass(frozen=True, order=True)
class Place:
    """where: FILE:LINE that does it; asked_by: the line of this package that called, the same where it is its own."""

    what: str
    where: str
    asked_by: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" + ("" if self.where == self.asked_by else f", called at {self.asked_by}")


@dataclass
class Waits:
    """count: of each place, by moment of the step."""

    count: Counter[tuple[str, Place]] = field(default_factory=Counter)

    def copy(self) -> "Waits":
        return Waits(self.count.copy())

    def note(self, phase: str, what: str) -> None:
        self.count[phase, _place(what)] += 1


def called_from(file: str) -> bool:
    """Whether a function of that file is under way, inside PyTorch's own at most."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or _passes_on(frame.f_code.co_filename)):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename == file


def _place(what: str) -> Place:
    frame, where, asked_by = sys._getframe(2), None, None
    while frame is not None and asked_by is None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and not _passes_on(file):
            line = f"{_short(file)}:{frame.f_lineno}"
            where = where or line
            if file.startswith(str(PACKAGE)):
                asked_by = line
        frame = frame.f_back
    return Place(what, where or "?", asked_by or where or "?")


def _passes_on(file: str) -> bool:
    return file.startswith((*_BETWEEN, "<"))


def _short(file: str) -> str:
    path = Path(file)
    if PACKAGE in path.parents:
        return str(path.relative_to(PACKAGE.parent))
    return file.rsplit("site-packages/", 1)[-1]
