"""Two ways to get a bucket's pieces from rank to rank: reading shared memory in place, or the process group.

Every rank calls both in the same way, bucket after bucket: `launch(k + 1)`, then `receive(k)`, whose tensors are valid
until `launch(k + 2)`. So bucket k + 1 is under way while k is written, and never more than two are in memory.
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
    """buffer_bytes: memory that the two buckets take together."""

    buffer_bytes: int

    def launch(self, number: int) -> None:
        """Pack this rank's pieces of bucket `number`, and start sending them."""

    def receive(self, number: int) -> list[Tensor]:
        """Bucket `number`'s `receives`, [rows, cols] each. Raises TimeoutError where another rank stays silent."""
        ...


class ProcessGroupExchange:
    """One all-to-all of the process group for each bucket."""

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
    """Every rank reads the others' parameters in shared memory; no rank waits for another between start and end."""

    buffer_bytes = 0

    def __init__(self, transfers: Transfers, parameters: Mapping[tuple[int, str], Tensor]):
        """parameters: the other ranks' parameters, by (rank, name), as `share_parameters` returns them."""
        self._buckets, self._parameters = transfers.buckets, parameters

    def launch(self, number: int) -> None:
        pass

    def receive(self, number: int) -> list[Tensor]:
        return [
            rectangle(self._parameters[piece.source_rank, piece.source.parameter], piece.source)
            for piece in self._buckets[number].receives
        ]


def meet(device: torch.device, timeout: float) -> None:
    """A barrier. Raises TimeoutError where a rank does not come within `timeout` seconds."""
    if world_size() > 1:
        wait(torch.distributed.all_reduce(torch.zeros(1, device=device), async_op=True), timeout)


def wait(work: torch.distributed.Work, timeout: float) -> None:
    """Wait for `work`, at most `timeout` seconds; then raise TimeoutError.

    NCCL's own `wait` returns at once, and only its watchdog would notice a dead peer.
    """
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another rank sent nothing for {timeout:g} s")
        time.sleep(1e-4)
    work.wait()


def all_to_all(send: Tensor, sends: list[int], received: Tensor, receives: list[int]) -> torch.distributed.Work:
    """Send `sends[r]` elements of `send` to each rank r, in rank order, and fill `received` likewise.

    The tensors travel as bytes, a dtype that every backend has.
    """
    size = send.element_size()
    work = torch.distributed.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [elements * size for elements in receives],
        [elements * size for elements in sends],
        async_op=True,
    )
    assert work is not None, "every rank is of the job's group"
    return work


def split_sizes(amounts: Iterable[tuple[int, int]]) -> list[int]:
    """[world size]: for each rank the sum of its amounts, given as (rank, amount)."""
    sizes = [0] * world_size()
    for rank, amount in amounts:
        sizes[rank] += amount
    return sizes


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _unpack(buffer: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Consecutive views of the flat `buffer`, one for each piece, [rows, cols]."""
    parts = buffer.split([piece.elements for piece in pieces]) if pieces else ()
    return [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
