"""One answer on all ranks: what any of them saw, what all of them have done, what the first one found. Collectives."""

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
    """True on every rank if `flag` is on one of them; the ranks agree through a tensor on `device`."""
    return _reduced(flag, device, torch.distributed.ReduceOp.MAX)


def all_ranks(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is on each of them."""
    return _reduced(flag, device, torch.distributed.ReduceOp.MIN)


def from_first_rank(value: Value) -> Value:
    """Rank 0's `value` on every rank: what stands on a shared disk may be seen later by another host."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def failing_together(device: torch.device, waiting: AbstractContextManager[None] | None = None) -> Iterator[None]:
    """What fails inside on one rank fails on all: there by its own error, elsewhere by a UserError that names the rank.

    A collective at its end, through `device`. Inside, no rank may wait for another that could have failed. Who waits at
    the end for the others does so within `waiting`: a phase of its own, so that the watchdog tells who is behind.
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
    """Problem and remedy, as the other ranks say them."""
    if isinstance(error, UserError):
        return f"{this_rank()}: {error.problem}", error.remedy
    return f"{this_rank()}: {type(error).__name__}: {error}", "see the traceback of that rank"


def _reduced(flag: bool, device: torch.device, operation) -> bool:
    tensor = torch.tensor([flag], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(tensor, op=operation)
    return bool(tensor.item())
