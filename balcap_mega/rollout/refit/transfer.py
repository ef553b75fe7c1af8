"""The refit itself: the trainer's weights into the engine's parameters, bucket by bucket."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from balcap_mega.errors import UserError
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit.pieces import CorruptPieces, Write, checksums, rectangle
from balcap_mega.rollout.refit.plan import Bucket, Piece, RefitPlan

BUCKET_BYTES = 2**28


class RefitError(RuntimeError):
    """A refit that cannot go on, on this rank or because another one is silent: names the phase and the bucket."""


class CorruptRefit(UserError, RefitError):
    """The engine did not get the trainer's weights, which are good: what lies between them is not."""


@dataclass(frozen=True)
class RefitReport:
    """What one refit did on this rank.

    seconds:           by phase. offload: the trainer makes room; wake: the engine's memory comes back; transfer: pieces
                       travel and are written; finalise: vLLM packs or quantises them, and its caches are reset
    local_bytes:       copied within the rank
    sent_bytes, received_bytes: exchanged with other ranks
    lower_bound_bytes: what the rank's engine needed and the rank did not hold
    buffer_bytes:      the peak of extra memory: two buckets
    """

    seconds: dict[str, float]
    buckets: int
    local_bytes: int
    sent_bytes: int
    received_bytes: int
    lower_bound_bytes: int
    buffer_bytes: int


class Refit:
    """Moves the policy's weights into the engine by `plan`, as often as asked.

    policy:          this rank's part of the policy, named as in the plan; its values are read at each `run`
    timeout_seconds: how long any rank waits for the others before it gives up
    verify_every:    every n-th refit, the first included, compares checksums of every piece, taken before it leaves and
                     after it is written; 0: none does
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: RolloutEngine,
        plan: RefitPlan,
        *,
        timeout_seconds: float,
        verify_every: int = 0,
    ):
        self._parameters = dict(policy.named_parameters())
        self._engine = engine
        self._plan = plan
        self._timeout = timeout_seconds
        self._verify_every = verify_every
        self._runs = 0
        self._dtype = engine.dtype
        init_info = {"target_elements": plan.target_elements, "dtype": engine.dtype}
        self._rpc("init_weight_transfer_engine", init_info=init_info)

    def run(self, offload: Callable[[], None] | None = None) -> RefitReport:
        """One refit; a collective. Afterwards the engine is awake, with the new weights and empty caches.

        offload: frees the device memory that the engine is about to claim. Raises RefitError.
        """
        clock = _Clock()
        self._verify = self._verify_every > 0 and self._runs % self._verify_every == 0
        self._runs += 1
        with clock("offload"), self._naming("offload"):
            if offload is not None:
                offload()
        with clock("wake"), self._naming("wake"):
            self._engine.wake_weights()
        with clock("transfer"):
            with self._naming("start"):
                self._meet()
                self._rpc("start_refit")
            self._transfer()
            with self._naming("finish"):
                processing = self._rpc("finish_refit")
                self._meet()
        clock.move(processing, "transfer", "finalise")
        with clock("finalise"), self._naming("finalise"):
            self._engine.wake_cache()
            self._engine.reset_caches()
        return self._report(clock.seconds)

    def _transfer(self) -> None:
        """Bucket k + 1 is packed and on its way while bucket k is written."""
        buckets = self._plan.buckets
        buffers = [self._empty(self._plan.buffer_elements) for _ in range(min(2, len(buckets)))]
        ahead: _Exchange | None = None
        for number, bucket in enumerate(buckets):
            if ahead is None:
                ahead = self._launch(number, bucket, buffers[0])
            current, ahead = ahead, None
            if number + 1 < len(buckets):
                ahead = self._launch(number + 1, buckets[number + 1], buffers[(number + 1) % 2])
            with self._naming("transfer", number):
                self._wait(current.work)
                update = {"writes": self._writes(bucket, current.received), "checksums": None}
                if self._verify:
                    update["checksums"] = self._expected_checksums(bucket)
                self._rpc("update_weights", update_info=update)

    def _launch(self, number: int, bucket: Bucket, buffer: Tensor) -> "_Exchange":
        with self._naming("transfer", number):
            send = buffer[: bucket.send_elements]
            received = buffer[bucket.send_elements :][: bucket.receive_elements]
            if bucket.sends:
                torch._foreach_copy_(_unpack(send, bucket.sends), self._sources(bucket.sends))
            if _world_size() == 1:
                return _Exchange(None, received)
            sends = _split_sizes((piece.target_rank, piece.elements) for piece in bucket.sends)
            receives = _split_sizes((piece.source_rank, piece.elements) for piece in bucket.receives)
            return _Exchange(_exchange(send, sends, received, receives), received)

    def _writes(self, bucket: Bucket, received: Tensor) -> list[Write]:
        values = [*self._sources(bucket.local), *_unpack(received, bucket.receives)]
        pieces = (*bucket.local, *bucket.receives)
        return [Write(piece.target, tensor) for piece, tensor in zip(pieces, values, strict=True)]

    def _sources(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [rectangle(self._parameters[piece.source.parameter], piece.source) for piece in pieces]

    def _expected_checksums(self, bucket: Bucket) -> Tensor:
        """[n, 2] of the bucket's local pieces, then of its received ones as their senders computed them."""
        local = checksums(self._sources(bucket.local), self._dtype)
        if _world_size() == 1:
            return local
        sent = checksums(self._sources(bucket.sends), self._dtype).flatten().to(self._engine.device)
        received = sent.new_empty(2 * len(bucket.receives))
        sends = _split_sizes((piece.target_rank, 2) for piece in bucket.sends)
        receives = _split_sizes((piece.source_rank, 2) for piece in bucket.receives)
        self._wait(_exchange(sent, sends, received, receives))
        return torch.cat([local, received.cpu().view(-1, 2)])

    def _empty(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self._dtype, device=self._engine.device)

    def _meet(self) -> None:
        """Return when every rank is here, which a rank that died or stalled on its own never is."""
        if _world_size() > 1:
            self._wait(torch.distributed.all_reduce(torch.zeros(1, device=self._engine.device), async_op=True))

    def _wait(self, work) -> None:
        """Wait at most `timeout_seconds`. NCCL's own wait returns at once and leaves a dead peer to its watchdog."""
        if work is None:
            return
        deadline = time.monotonic() + self._timeout
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError(f"another rank sent nothing for {self._timeout:g} s")
            time.sleep(1e-4)
        work.wait()

    @contextmanager
    def _naming(self, phase: str, bucket: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            where = "" if bucket is None else f", bucket {bucket + 1} of {len(self._plan.buckets)}"
            message = f"refit stopped on rank {rank} in phase {phase}{where}: {error}"
            if isinstance(error, CorruptPieces):
                raise CorruptRefit(
                    message,
                    remedy="go on from the last checkpoint by the same command; if it comes again, on another machine",
                ) from error
            raise RefitError(message) from error

    def _rpc(self, method: str, **arguments):
        (result,) = self._engine.llm.collective_rpc(method, kwargs=arguments)
        return result

    def _report(self, seconds: dict[str, float]) -> RefitReport:
        plan, size = self._plan, self._dtype.itemsize
        return RefitReport(
            seconds=seconds,
            buckets=len(plan.buckets),
            local_bytes=plan.local_elements * size,
            sent_bytes=plan.sent_elements * size,
            received_bytes=plan.received_elements * size,
            lower_bound_bytes=plan.lower_bound_elements * size,
            buffer_bytes=plan.buffer_elements * size * min(2, len(plan.buckets)),
        )


@dataclass(frozen=True)
class _Exchange:
    """A bucket under way; `received` holds its pieces once `work` is done."""

    work: torch.distributed.Work | None
    received: Tensor


class _Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = dict.fromkeys(("offload", "wake", "transfer", "finalise"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def move(self, seconds: float, source: str, target: str) -> None:
        self.seconds[source] -= seconds
        self.seconds[target] += seconds


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _split_sizes(amounts: Iterator[tuple[int, int]]) -> list[int]:
    sizes = [0] * _world_size()
    for rank, amount in amounts:
        sizes[rank] += amount
    return sizes


def _exchange(send: Tensor, sends: list[int], received: Tensor, receives: list[int]):
    """Every rank's share of `send`, in rank order, to that rank; bytes, which every backend can carry."""
    size = send.element_size()
    return torch.distributed.all_to_all_single(
        received.view(torch.uint8),
        send.view(torch.uint8),
        [elements * size for elements in receives],
        [elements * size for elements in sends],
        async_op=True,
    )


def _unpack(buffer: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
    """Views of `buffer`, one after the other, as [rows, cols] of each piece."""
    parts = buffer.split([piece.elements for piece in pieces]) if pieces else ()
    return [part.view(_shape(piece)) for part, piece in zip(parts, pieces, strict=True)]


def _shape(piece: Piece) -> tuple[int, int]:
    (top, bottom), (left, right) = piece.source.rows, piece.source.cols
    return bottom - top, right - left
