"""What a check found out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from balcap_mega.errors import UserError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the checklist. `FAIL` stops a run or spoils it, `warn` may; either says in `remedy` what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """`check()`, where what it raises is a FAIL: bad input with its own remedy, anything else as what it is."""
    try:
        return check()
    except UserError as error:
        return Finding(name, "FAIL", error.problem, error.remedy)
    except Exception as error:
        return Finding(name, "FAIL", f"{type(error).__name__}: {error}", "this is a bug, or a broken installation")


def at_most(name: str, status: Status, detail: str, problems: list[str], remedy: str) -> Finding:
    """ok with `detail` if there are no `problems`, else `status` with them and the remedy."""
    return Finding(name, status, "; ".join(problems), remedy) if problems else Finding(name, "ok", detail)
