"""The last program of a launch to finish, which then reduces what all of them left behind: no second launch needed,
and a fixed order of summation, so results are deterministic.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def is_last_program(counter):
    """True in exactly one program of a one-dimensional grid: the one that arrives last. Stores that other programs
    made before their call are visible to it, past the first-level cache (load them with `cache_modifier=".cg"`).
    """
    tl.debug_barrier()  # this program's stores come before its arrival
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)  # ready for the next launch, without a memset
    return last


def arrival_counter(device: torch.device) -> Tensor:
    """A zero that launches of one stream share: they follow one another, and each leaves it at zero."""
    return _counter(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@cache
def _counter(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
