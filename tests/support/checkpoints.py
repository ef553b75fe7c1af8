"""Checkpoints as Megatron itself gathers them, and what the host's memory holds meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from unittest.mock import patch

import torch

from balcap_mega.training.checkpoint import writer
from balcap_mega.training.checkpoint.format import CONTENT


def gathered_state(model, optimizer, *, is_loading: bool) -> tuple[dict, None]:
    """What `sharded_state` returned before: Megatron gathers the optimizer on the first data-parallel rank."""
    metadata = CONTENT | {"distrib_optim_fully_reshardable_mem_efficient": True}
    weights = model.module.sharded_state_dict(metadata=metadata)
    whole = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": whole}, None


@contextmanager
def gathering() -> Iterator[None]:
    """Inside, a `CheckpointWriter` saves as it did before."""
    with patch.object(writer, "sharded_state", gathered_state):
        yield


def allocated(work: Callable[[], None]) -> int:
    """The most bytes of tensors that this thread's `work` had allocated at once, by PyTorch's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))
