"""The refit itself: the trainer's weights into the engine's parameters, bucket by bucket."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from balcap_mega.errors import UserError
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit.exchange import (
    Exchange,
    PeerExchange,
    ProcessGroupExchange,
    all_to_all,
    meet,
    split_sizes,
    wait,
    world_size,
)
from balcap_mega.rollout.refit.peers import share_parameters
from balcap_mega.rollout.refit.pieces import CorruptPieces, Write, checksums, rectangle
from balcap_mega.rollout.refit.transfers import Bucket, Piece, Transfers

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
    buffer_bytes:      the peak of extra memory: two buckets, or none where ranks read each other's weights in place
    """

    seconds: dict[str, float]
    buckets: int
    local_bytes: int
    sent_bytes: int
    received_bytes: int
    lower_bound_bytes: int
    buffer_bytes: int


class Refit:
    """Moves the policy's weights into the engine as `transfers` say, as often as asked.

    policy:          this rank's part of the policy, named as in the transfers; its values are read at each `run`
    timeout_seconds: how long any rank waits for the others before it gives up
    verify_every:    every n-th refit, the first included, compares checksums of every piece, taken before it leaves and
                     after it is written; 0: none does
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: RolloutEngine,
        transfers: Transfers,
        *,
        timeout_seconds: float,
        verify_every: int = 0,
    ):
        self._parameters = dict(policy.named_parameters())
        self._engine = engine
        self._transfers = transfers
        self._timeout = timeout_seconds
        self._verify_every = verify_every
        self._runs = 0
        self._dtype = engine.dtype
        self._peers = None
        if world_size() > 1 and engine.device.type == "cpu":
            offered = {piece.source.parameter for bucket in transfers.buckets for piece in bucket.sends}
            received = (piece for bucket in transfers.buckets for piece in bucket.receives)
            wanted = {(piece.source_rank, piece.source.parameter) for piece in received}
            self._peers = share_parameters({name: self._parameters[name] for name in offered}, wanted)
        init_info = {
            "target_elements": transfers.target_elements,
            "kept_elements": transfers.kept_elements,
            "dtype": engine.dtype,
        }
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
            self._move()
            with self._naming("finish"):
                processing = self._rpc("finish_refit")
                self._meet()
        clock.move(processing, "transfer", "finalise")
        with clock("finalise"), self._naming("finalise"):
            self._engine.wake_cache()
            self._engine.reset_caches()
        return self._report(clock.seconds)

    def _move(self) -> None:
        """Bucket k + 1 is packed and on its way while bucket k is written."""
        exchange, buckets = self._exchange(), self._transfers.buckets
        self._buffer_bytes = exchange.buffer_bytes
        for number, bucket in enumerate(buckets):
            if number == 0:
                self._launch(exchange, number)
            if number + 1 < len(buckets):
                self._launch(exchange, number + 1)
            with self._naming("transfer", number):
                update = {"writes": self._writes(bucket, exchange.receive(number)), "checksums": None}
                if self._verify:
                    update["checksums"] = self._expected_checksums(bucket)
                self._rpc("update_weights", update_info=update)

    def _exchange(self) -> Exchange:
        if self._peers is not None:
            return PeerExchange(self._transfers, self._peers)
        return ProcessGroupExchange(self._transfers, self._sources, self._dtype, self._engine.device, self._timeout)

    def _launch(self, exchange: Exchange, number: int) -> None:
        with self._naming("transfer", number):
            exchange.launch(number)

    def _writes(self, bucket: Bucket, received: Sequence[Tensor]) -> list[Write]:
        values = [*self._sources(bucket.local), *received]
        pieces = (*bucket.local, *bucket.receives)
        return [Write(piece.target, tensor) for piece, tensor in zip(pieces, values, strict=True)]

    def _sources(self, pieces: Sequence[Piece]) -> list[Tensor]:
        return [rectangle(self._parameters[piece.source.parameter], piece.source) for piece in pieces]

    def _expected_checksums(self, bucket: Bucket) -> Tensor:
        """[n, 2] of the bucket's local pieces, then of its received ones as their senders computed them."""
        local = checksums(self._sources(bucket.local), self._dtype)
        if world_size() == 1:
            return local
        sent = checksums(self._sources(bucket.sends), self._dtype).flatten().to(self._engine.device)
        received = sent.new_empty(2 * len(bucket.receives))
        sends = split_sizes((piece.target_rank, 2) for piece in bucket.sends)
        receives = split_sizes((piece.source_rank, 2) for piece in bucket.receives)
        wait(all_to_all(sent, sends, received, receives), self._timeout)
        return torch.cat([local, received.cpu().view(-1, 2)])

    def _meet(self) -> None:
        meet(self._engine.device, self._timeout)

    @contextmanager
    def _naming(self, phase: str, bucket: int | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            where = "" if bucket is None else f", bucket {bucket + 1} of {len(self._transfers.buckets)}"
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
        transfers, size = self._transfers, self._dtype.itemsize
        return RefitReport(
            seconds=seconds,
            buckets=len(transfers.buckets),
            local_bytes=transfers.local_elements * size,
            sent_bytes=transfers.sent_elements * size,
            received_bytes=transfers.received_elements * size,
            lower_bound_bytes=transfers.lower_bound_elements * size,
            buffer_bytes=self._buffer_bytes,
        )


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
