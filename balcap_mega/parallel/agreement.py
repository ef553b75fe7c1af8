"""Collectives after which all ranks have the same answer: of any rank, of all ranks, or of rank 0."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
import torch.distributed

from balcap_mega.errors import UserError
from balcap_mega.parallel.host import this_rank
from balcap_mega.parallel.progress import progress

Value = TypeVar("Value")


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is True on at least one. The collective runs on a tensor on `device`."""
    return _reduced(flag, device, torch.distributed.ReduceOp.MAX)


def all_ranks(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is True on all of them. The collective runs on a tensor on `device`."""
    return _reduced(flag, device, torch.distributed.ReduceOp.MIN)


def from_first_rank(value: Value) -> Value:
    """Rank 0's `value`, which is pickled, on every rank.

    For what is read off a shared disk: another host may see a new file later than rank 0 does.
    """
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def failing_together(device: torch.device, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
    """If the body raises on one rank, all ranks raise: that one its own error, the others a UserError that names it.

    Leaving the body is a collective on `device`. Inside, no rank may wait for a rank that could have failed.

    waiting: entered while this rank waits for the others at the end. By default that is a phase `agreement`, by which
             the watchdog tells a rank that waits from the rank that it waits for.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    with waiting or progress.phase("agreement"):
        failed = any_rank(error is not None, device)
    if not failed:
        return
    failures: list[tuple[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, None if error is None else _described(error))
    if error is not None:
        raise error
    problem, remedy = next(failure for failure in failures if failure is not None)
    raise UserError(problem, remedy=remedy)


def _described(error: Exception) -> tuple[str, str]:
    """Problem and remedy for the UserError of the other ranks."""
    if isinstance(error, UserError):
        return f"{this_rank()}: {error.problem}", error.remedy
    return f"{this_rank()}: {type(error).__name__}: {error}", "see the traceback of that rank"


def _reduced(flag: bool, device: torch.device, operation) -> bool:
    tensor = torch.tensor([flag], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(tensor, op=operation)
    return bool(tensor.item())
