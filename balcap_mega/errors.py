"""The one error a user is expected to see."""

import re

LONGEST = 2000  # characters of a problem, and of a remedy
_LINE_BREAK = re.compile(r"\s*[\n\r\u2028\u2029]\s*")


class UserError(Exception):
    """Bad input that its sender can mend: names the file, the key and the value, and says what to do.

    Entry points print it as one line and exit with status 2; everything else is a bug and keeps its traceback. What
    the message quotes may come from a hostile file: it cannot break the line, steer a terminal or fill a log.
    """

    def __init__(self, problem: str, *, remedy: str):
        problem, remedy = _one_line(problem), _one_line(remedy)
        super().__init__(f"{problem} — {remedy}")
        self.problem = problem
        self.remedy = remedy


def _one_line(text: str) -> str:
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in _LINE_BREAK.sub(" ", text))
