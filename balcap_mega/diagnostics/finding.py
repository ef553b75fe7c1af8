"""What a check found out, and how a check is written.

    @check("disk")
    def check_disk(folder: Path) -> Finding:
        return ok("plenty") if ... else fail("none", "free some")

Called, it returns a Finding of that name whatever happens: what it raises is one too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal, ParamSpec

from balcap_mega.errors import UserError

P = ParamSpec("P")


@dataclass(frozen=True)
class Finding:
    """One line of the checklist. `FAIL` ends a run or spoils it, `warn` may; both say in `remedy` what to do."""

    name: str
    status: Literal["ok", "warn", "FAIL"]
    detail: str
    remedy: str = ""


def ok(detail: str) -> Finding:
    return Finding("", "ok", detail)


def warn(detail: str, remedy: str) -> Finding:
    return Finding("", "warn", detail, remedy)


def fail(detail: str, remedy: str) -> Finding:
    return Finding("", "FAIL", detail, remedy)


def check(name: str) -> Callable[[Callable[P, Finding]], Callable[P, Finding]]:
    """Name what the function finds, and make a FAIL of what it raises, a UserError with its own remedy."""

    def decorate(function: Callable[P, Finding]) -> Callable[P, Finding]:
        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Finding:
            try:
                return replace(function(*args, **kwargs), name=name)
            except UserError as error:
                return Finding(name, "FAIL", error.problem, error.remedy)
            except Exception as error:
                remedy = "mend the installation: bash launch/install.sh"
                return Finding(name, "FAIL", f"{type(error).__name__}: {error}", remedy)

        return checked

    return decorate


def some(items: list[str], limit: int = 4) -> str:
    """The first few of `items`, and how many more there are."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
