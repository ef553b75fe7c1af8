"""The parameters of the other ranks of a host, read where they stand: no buffer, no packing, no turn to wait for."""

import mmap
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from balcap_mega.parallel.agreement import all_ranks

TOKEN_BYTES = 16


@dataclass(frozen=True)
class _View:
    """A tensor of another process: the descriptor of its storage there, and where in it the tensor stands."""

    descriptor: int
    size: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Offer:
    """What a rank tells the others of its parameters. The token stands at the start of what `descriptor` opens."""

    process: int
    descriptor: int
    token: bytes
    views: dict[str, _View]


def share_parameters(
    parameters: Mapping[str, Tensor], wanted: Collection[tuple[int, str]]
) -> dict[tuple[int, str], Tensor] | None:
    """The parameters that this rank wants from others, by (rank, name): live views of their memory.

    parameters: what others want of this rank, on the CPU; their storages move to shared memory, in place, so that all
                views of them follow. That memory has no name, and goes with the last process that maps it.

    None on all ranks where one of them cannot reach another's, as on another host or in another container, or where
    the host's shared memory is too small. A collective over the ranks of the job. Whoever writes to a parameter sees to
    it that nobody reads it meanwhile.
    """
    cpu = torch.device("cpu")
    if not all_ranks(_there_is_room(parameters), cpu):
        return None
    descriptor = os.memfd_create("balcap_mega.refit")
    try:
        token = os.urandom(TOKEN_BYTES)
        os.pwrite(descriptor, token, 0)
        mine = _Offer(os.getpid(), descriptor, token, {name: _view(tensor) for name, tensor in parameters.items()})
        offers: list[_Offer] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(offers, mine)
        mapped = _map(offers, wanted)
        # Nobody closes its descriptor before all have opened it.
        return mapped if all_ranks(mapped is not None, cpu) else None
    finally:
        os.close(descriptor)


def _there_is_room(parameters: Mapping[str, Tensor]) -> bool:
    """For all ranks' parameters, as if they shared this host: what is not there would be a bus error at first touch."""
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in parameters.values())}
    needed = torch.tensor(sum(storage.nbytes() for storage in storages.values() if not storage.is_shared()))
    torch.distributed.all_reduce(needed)
    found = os.statvfs("/dev/shm")
    return int(needed) < found.f_bavail * found.f_frsize


def _view(tensor: Tensor) -> _View:
    descriptor, size = tensor.untyped_storage()._share_fd_cpu_()
    return _View(descriptor, size, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


def _map(offers: list[_Offer], wanted: Collection[tuple[int, str]]) -> dict[tuple[int, str], Tensor] | None:
    """None where a process is not there, or its number is another process's here."""
    storages: dict[tuple[int, int], Tensor] = {}
    tensors = {}
    try:
        for rank in {rank for rank, _ in wanted}:
            with _open(offers[rank], offers[rank].descriptor) as file:
                if file.read(TOKEN_BYTES) != offers[rank].token:
                    return None
        for rank, name in wanted:
            view = offers[rank].views[name]
            place = rank, view.descriptor
            if place not in storages:
                with _open(offers[rank], view.descriptor) as file:
                    storages[place] = torch.frombuffer(mmap.mmap(file.fileno(), view.size), dtype=torch.uint8)
            tensors[rank, name] = storages[place].view(view.dtype).as_strided(view.shape, view.stride, view.offset)
    except OSError:
        return None
    return tensors


def _open(offer: _Offer, descriptor: int):
    return open(f"/proc/{offer.process}/fd/{descriptor}", "r+b", buffering=0)
