"""Shared memory through which the ranks of a host read each other's parameters, without buffers or packing."""

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
    """A tensor of another process: the file descriptor of its storage in that process, and its place in the storage.

    size: bytes of the storage. offset, stride: in elements, as torch has them
    """

    descriptor: int
    size: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Offer:
    """What a rank sends to the others, so that they can map its parameters.

    token: random bytes that the file behind `descriptor` begins with. Who reads them there has found the right process.
    """

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

    A collective over the ranks of the job. Returns None on all ranks if any rank cannot open another's memory, as on
    another host or in another container, or if the host's shared memory is too small. Callers must not write to a
    parameter while another rank reads it.
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
        # This rank keeps its descriptor open until all ranks have opened it.
        return mapped if all_ranks(mapped is not None, cpu) else None
    finally:
        os.close(descriptor)


def _there_is_room(parameters: Mapping[str, Tensor]) -> bool:
    """Whether shared memory has room for all ranks' parameters, as if all were on this host.

    Too little room would show only as a bus error, when a page is first touched.
    """
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in parameters.values())}
    needed = torch.tensor(sum(storage.nbytes() for storage in storages.values() if not storage.is_shared()))
    torch.distributed.all_reduce(needed)
    found = os.statvfs("/dev/shm")
    return int(needed) < found.f_bavail * found.f_frsize


def _view(tensor: Tensor) -> _View:
    descriptor, size = tensor.untyped_storage()._share_fd_cpu_()
    return _View(descriptor, size, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


def _map(offers: list[_Offer], wanted: Collection[tuple[int, str]]) -> dict[tuple[int, str], Tensor] | None:
    """None if a process cannot be reached, or if its id belongs to another process on this host."""
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
