"""How a bucket's pieces get from rank to rank: read in place where ranks share memory, else by the process group.

Both are used alike, on every rank and bucket after bucket: `launch(k + 1)`, then `receive(k)`, whose tensors are read
before `launch(k + 2)`. So bucket k + 1 is prepared while k is written, and two buckets are the most memory it takes.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from balcap_mega.rollout.refit.pieces import rectangle
from balcap_mega.rollout.refit.transfers import Bucket, Piece, Transfers

Sources = Callable[[Sequence[Piece]], list[Tensor]]
"""Views [rows, cols] of the trainer's weights, one a piece."""


class Exchange(Protocol):
    """buffer_bytes: the memory it takes, both buckets together."""

    buffer_bytes: int

    def launch(self, number: int) -> None:
        """Pack what this rank sends in bucket `number`, and set it off."""

    def receive(self, number: int) -> list[Tensor]:
        """Bucket `number`'s `receives`, [rows, cols] each. Raises TimeoutError where another rank stays silent."""


class ProcessGroupExchange:
    """One all-to-all a bucket, over whatever links the backend has."""

    def __init__(
        self, transfers: Transfers, sources: Sources, dtype: torch.dtype, device: torch.device, timeout: float
    ):
        self._buckets, self._sources, self._timeout = transfers.buckets, sources, timeout
        self._buffers = [
            torch.empty(transfers.buffer_elements, dtype=dtype, device=device)
            for _ in range(min(2, len(transfers.buckets)))
        ]
        self._work: list[torch.distributed.Work | None] = [None, None]
        self.buffer_bytes = sum(buffer.nbytes for buffer in self._buffers)

    def launch(self, number: int) -> None:
        bucket = self._buckets[number]
        send, received = self._parts(number)
        if bucket.sends:
            torch._foreach_copy_(_unpack(send, bucket.sends), self._sources(bucket.sends))
        if world_size() > 1:
            sends = split_sizes((piece.target_rank, piece.elements) for piece in bucket.sends)
            receives = split_sizes((piece.source_rank, piece.elements) for piece in bucket.receives)
            self._work[number % 2] = all_to_all(send, sends, received, receives)

    def receive(self, number: int) -> list[Tensor]:
        if (work := self._work[number % 2]) is not None:
            wait(work, self._timeout)
        return _unpack(self._parts(number)[1], self._buckets[number].receives)

    def _parts(self, number: int) -> tuple[Tensor, Tensor]:
        bucket: Bucket = self._buckets[number]
        buffer = self._buffers[number % 2]
        return buffer[: bucket.send_elements], buffer[bucket.send_elements :][: bucket.receive_elements]


class PeerExchange:
    """Every rank reads the others' parameters where they stand: no rank waits for another between start and end."""

    buffer_bytes = 0

    def __init__(self, transfers: Transfers, parameters: Mapping[tuple[int, str], Tensor]):
        """parameters: what `share_parameters` found of the other ranks'."""
        self._buckets, self._parameters = transfers.buckets, parameters

    def launch(self, number: int) -> None:
        pass

    def receive(self, number: int) -> list[Tensor]:
        return [
            rectangle(self._parameters[piece.source_rank, piece.source.parameter], piece.source)
            for piece in self._buckets[number].receives
        ]


def meet(device: torch.device, timeout: float) -> None:
    """Return when every rank is here. Raises TimeoutError where one never comes, having died or stalled on its own."""
    if world_size() > 1:
        wait(torch.distributed.all_reduce(torch.zeros(1, device=device), async_op=True), timeout)


def wait(work: torch.distributed.Work, timeout: float) -> None:
    """Wait at most `timeout` seconds. NCCL's own wait returns at once and leaves a dead peer to its watchdog."""
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another rank sent nothing for {timeout:g} s")
        time.sleep(1e-4)
    work.wait()


def all_to_all(send: Tensor, sends: list[int], received: Tensor, receives: list[int]) -> torch.distributed.Work:
    """Every rank's share of `send`, in rank order, to that rank; bytes, which every backend can carry."""
    size = send.element_size()
    return torch.distributed.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [elements * size for elements in receives],
        [elements * size for elements in sends],
        async_op=True,
    )


def split_sizes(amounts: Iterable[tuple[int, int]]) -> list[int]:
    """The sum of the amounts that go to each rank."""
    sizes = [0] * world_size()
    for rank, amount in amounts:
        sizes[rank] += amount
    return sizes


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _unpack(buffer: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Views of `buffer`, one after the other, as [rows, cols] of each piece."""
    parts = buffer.split([piece.elements for piece in pieces]) if pieces else ()
    return [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
