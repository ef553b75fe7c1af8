"""Memory that the ranks of one host have in common, without a name that a killed rank could leave behind."""

import mmap
import os
from dataclasses import dataclass

import torch
from torch import Tensor

HEADER_BYTES = 64  # the token, padded so that what follows is aligned


@dataclass(frozen=True)
class _Offer:
    """Where a rank's memory is found: a descriptor of its process, and the token that stands at its start."""

    process: int
    descriptor: int
    size: int
    token: bytes


def share_memory(size: int) -> list[Tensor] | None:
    """`size` bytes of this rank, which the others may read in place: every rank's [size of that rank] uint8, by rank.

    None on all ranks where one of them cannot reach another's, as on another host or in another container. A collective
    over the ranks of the job. The memory goes with the last process that maps it.
    """
    descriptor = os.memfd_create("balcap_mega.refit")
    try:
        os.truncate(descriptor, HEADER_BYTES + size)
        mine = _Offer(os.getpid(), descriptor, HEADER_BYTES + size, os.urandom(16))
        os.pwrite(descriptor, mine.token, 0)
        offers: list[_Offer] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(offers, mine)
        mapped = [_map(offer) for offer in offers]
        missing = torch.tensor(sum(memory is None for memory in mapped))
        torch.distributed.all_reduce(missing)  # nobody closes its descriptor before all have opened it
    finally:
        os.close(descriptor)
    return None if missing else mapped


def _map(offer: _Offer) -> Tensor | None:
    """The memory behind an offer; None where that process is not there, or its number is another process's here."""
    try:
        descriptor = os.open(f"/proc/{offer.process}/fd/{offer.descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size != offer.size or os.pread(descriptor, len(offer.token), 0) != offer.token:
            return None
        return torch.frombuffer(mmap.mmap(descriptor, offer.size), dtype=torch.uint8)[HEADER_BYTES:]
    finally:
        os.close(descriptor)
