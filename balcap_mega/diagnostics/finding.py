"""What a check found out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from balcap_mega.errors import UserError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the checklist. `FAIL` ends a run or spoils it, `warn` may; both say in `remedy` what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """`check()`; what it raises is a FAIL: bad input with its own remedy, anything else under its own name."""
    try:
        return check()
    except UserError as error:
        return Finding(name, "FAIL", error.problem, error.remedy)
    except Exception as error:
        return Finding(
            name, "FAIL", f"{type(error).__name__}: {error}", "mend the installation: bash launch/install.sh"
        )


def some(items: list[str], limit: int = 4) -> str:
    """The first few of `items`, and how many more there are."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")
