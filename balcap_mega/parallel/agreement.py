"""One answer on all ranks: what any of them saw, what all of them have done, what the first one found. Collectives."""

from typing import TypeVar

import torch
import torch.distributed

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


def _reduced(flag: bool, device: torch.device, operation) -> bool:
    tensor = torch.tensor([flag], dtype=torch.int32, device=device)
    torch.distributed.all_reduce(tensor, op=operation)
    return bool(tensor.item())
