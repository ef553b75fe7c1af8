"""One rank of a run whose other ranks are not there: PyTorch's fake process group, and what Megatron would ask others.

Every group is a fake one, gloo's too; objects gathered from all ranks are this rank's own; random state, which no shape
depends on, is left alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.testing._internal.distributed.fake_pg import FakeStore

from balcap_mega.parallel import cpu_redirects
from balcap_mega.parallel.groups import destroy_parallel
from balcap_mega.planning.dry_run.device import META, DryDevice
from balcap_mega.planning.dry_run.replaced import replaced


@contextmanager
def fake_world(rank: int, world: int) -> Iterator[None]:
    """Inside, this process is `rank` of `world`, and Megatron's "cuda" is the dry device."""
    if torch.distributed.is_initialized():
        raise RuntimeError("a dry run has its own process group: destroy the other one first")
    new_group = torch.distributed.new_group

    def fake_group(*args: Any, **kwargs: Any):
        return new_group(*args, **{**kwargs, "backend": "fake"})

    with replaced(
        (torch.distributed, "new_group", fake_group),
        (torch.distributed, "all_gather_object", _gather_own),
        (torch.distributed, "batch_isend_irecv", _one_by_one),
        (torch.distributed, "broadcast_object_list", lambda *args, **kwargs: None),
        (torch, "get_rng_state", lambda: torch.empty(0, dtype=torch.uint8)),
        (torch, "set_rng_state", lambda state: None),
        (megatron_random.CudaRNGStatesTracker, "fork", lambda *args: nullcontext()),
        (cpu_redirects, "CPU", META),
    ):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            destroy_parallel()
            torch.distributed.destroy_process_group()


def _one_by_one(operations: list[torch.distributed.P2POp]) -> list[torch.distributed.Work]:
    """PyTorch asks the device's backend first whether it takes them together."""
    return [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]


def _gather_own(objects: list, own: Any, group: Any = None) -> None:
    objects[:] = [own] * len(objects)


@contextmanager
def neighbours(shapes: list[tuple[int, int, int]], device: DryDevice) -> Iterator[None]:
    """The pipeline's neighbours tell the shapes of their tensors: of the rows in order, forward and backward alike."""
    forward, backward = iter(shapes), iter(shapes)

    def communicate(self, tensor_send_next, tensor_send_prev, recv_prev, recv_next):
        for told in (tensor_send_next is not None, tensor_send_prev is not None, recv_prev, recv_next):
            if told:
                device.collectives.add(self.pp_group, "shapes", 3 * 8)
        if recv_prev or recv_next:
            device.waits.note(device.ledger.moment, "the neighbour's shape")
        return (list(next(forward)) if recv_prev else [0, 0, 0]), (list(next(backward)) if recv_next else [0, 0, 0])

    with replaced((P2PCommunicator, "_communicate_shapes", communicate)):
        yield
