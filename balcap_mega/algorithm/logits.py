"""A chunk of logits of the vocabulary-parallel LM head: to logprobs and entropies, and in place to their gradient.

Plain PyTorch on a CPU; on CUDA the same two passes are `balcap_mega.kernels.lm_head`'s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from balcap_mega.algorithm.dispatch import use_kernels

CHUNK_BYTES = {"cpu": 2**28, "cuda": 7 * 2**27}
CACHE_ELEMENTS = 2**18
ROW_ALIGNMENT = 64
LOG2_E = math.log2(math.e)  # PyTorch's exp2 is more than twice as fast as its exp on a CPU


@dataclass(frozen=True)
class HeadShard:
    """One tensor-parallel rank's part of the output projection.

    weight:      [V_padded / TP, H], consecutive vocabulary rows by rank (Megatron's layout)
    vocab_size:  the true vocabulary size V; padded columns take no part in any sum and get no gradient
    group:       the tensor-parallel group, None for a single rank
    temperature: logits are divided by it
    chunk_bytes: logits held at a time; by default enough rows to keep the GEMMs of the device busy. A row's logprob may
                 depend on it in the last bits, so keep it the same wherever logprobs are compared.
    """

    weight: Tensor
    vocab_size: int
    group: ProcessGroup | None = None
    temperature: float = 1.0
    chunk_bytes: int | None = None

    @property
    def first_column(self) -> int:
        return 0 if self.group is None else self.group.rank() * self.weight.shape[0]

    @property
    def columns(self) -> int:
        """How many of this shard's rows are vocabulary and not padding."""
        return min(max(self.vocab_size - self.first_column, 0), self.weight.shape[0])

    def chunks(self, rows: int) -> list[slice]:
        """Even chunks of at most `chunk_bytes` of logits; a multiple of a large power of two, which GEMMs like."""
        row_bytes = self.weight.shape[0] * self.weight.element_size()
        limit = max((self.chunk_bytes or CHUNK_BYTES[self.weight.device.type]) // row_bytes, 1)
        multiple = 1 << max(limit.bit_length() - 3, 0)
        limit -= limit % multiple
        size = max(-(-rows // max(-(-rows // limit), 1)), 1)
        size += -size % multiple
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def logits_buffer(self, chunks: list[slice]) -> Tensor:
        """Room for the largest chunk's logits in the weight's dtype, rows aligned for vector loads whatever V is."""
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        width = self.columns + -self.columns % ROW_ALIGNMENT
        return self.weight.new_empty(rows, width, requires_grad=False)[:, : self.columns]

    def column_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's column in this shard, and whether it is there at all (a column to gather from if not)."""
        column = targets - self.first_column
        return column.clamp(0, max(self.columns - 1, 0)), (column >= 0) & (column < self.columns)


@dataclass(frozen=True)
class LogitStatistics:
    """Of T rows of logits z over the whole vocabulary, [T] float32 each: log Σ exp z, z at the target, Σ p z."""

    log_normaliser: Tensor
    target: Tensor
    mean: Tensor

    @property
    def logprobs(self) -> Tensor:
        return self.target - self.log_normaliser

    @property
    def entropy(self) -> Tensor:
        return self.log_normaliser - self.mean


@dataclass(frozen=True)
class Chunk:
    """T of the R rows: `rows` says which, and `hidden` [T, H] and `targets` [T] are theirs.

    logits: [T, columns], temperature not yet applied, padded columns left out; the next chunk takes their memory over
    """

    rows: slice
    hidden: Tensor
    targets: Tensor
    logits: Tensor
    statistics: LogitStatistics


def logit_chunks(hidden: Tensor, targets: Tensor, head: HeadShard) -> Iterator[Chunk]:
    """The logits of all R rows, as many at a time as `head` allows; hidden [R, H], targets [R]."""
    chunks = head.chunks(hidden.shape[0])
    buffer = head.logits_buffer(chunks)
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        torch.mm(hidden[rows], head.weight[: head.columns].t(), out=logits)
        yield Chunk(rows, hidden[rows], targets[rows], logits, _statistics(logits, targets[rows], head))


def _statistics(logits: Tensor, targets: Tensor, head: HeadShard) -> LogitStatistics:
    """Local max, Σ exp, Σ z exp and target logit of each row, merged over the group in one small all-gather."""
    if use_kernels(logits):
        from balcap_mega.kernels.lm_head import logit_statistics

        return merge_statistics(logit_statistics(logits, targets, head.first_column, head.temperature), head.group)
    local = torch.zeros(4, targets.numel(), device=logits.device)
    local[0] = -torch.inf  # what a shard of padding only has to say
    column, owned = head.column_of(targets)
    scale = 1 / head.temperature
    for rows in _cache_blocks(logits):
        block = logits[rows].float()
        maximum = block.amax(dim=1) * scale
        weights = torch.add(-LOG2_E * maximum[:, None], block, alpha=LOG2_E * scale).exp2_()
        moment = torch.linalg.vecdot(weights, block) * scale
        target = torch.where(owned[rows], block.gather(1, column[rows, None])[:, 0] * scale, 0.0)
        torch.stack((maximum, weights.sum(dim=1), moment, target), out=local[:, rows])
    return merge_statistics(local, head.group)


def merge_statistics(local: Tensor, group: ProcessGroup | None) -> LogitStatistics:
    """local: [4, T] float32 (max, Σ exp(z − max), Σ z exp(z − max), target logit or 0) of this rank's columns."""
    shards = local[None]
    if group is not None and group.size() > 1:
        gathered = local.new_empty(group.size() * 4, local.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, local, group=group)
        shards = gathered.view(group.size(), *local.shape)
    maximum = shards[:, 0].amax(dim=0)
    scale = (shards[:, 0] - maximum).exp()
    total = (shards[:, 1] * scale).sum(dim=0)
    mean = (shards[:, 2] * scale).sum(dim=0) / total
    return LogitStatistics(maximum + total.log(), shards[:, 3].sum(dim=0), mean)


def logits_to_gradient_(chunk: Chunk, d_logprobs: Tensor, d_entropy: Tensor | None, head: HeadShard) -> Tensor:
    """Overwrite the chunk's logits with their gradient, p the softmax and z the tempered logits of a row:

    d z_j = d_logp · (1[j = target] − p_j) − d_H · p_j · (log p_j + H),        d logit_j = d z_j / temperature
    """
    logits, targets, found = chunk.logits, chunk.targets, chunk.statistics
    if use_kernels(logits):
        from balcap_mega.kernels import lm_head

        return lm_head.logits_to_gradient_(
            logits, targets, found.log_normaliser, found.entropy, d_logprobs, d_entropy,
            head.first_column, head.temperature,
        )  # fmt: skip
    column, owned = head.column_of(targets)
    scale = 1 / head.temperature
    at_target = torch.where(owned, d_logprobs, 0.0) * scale
    for rows in _cache_blocks(logits):
        log_p = logits[rows].float().mul_(scale).sub_(found.log_normaliser[rows, None])
        coefficient = -scale * d_logprobs[rows, None]
        if d_entropy is not None:
            coefficient = coefficient - scale * d_entropy[rows, None] * (log_p + found.entropy[rows, None])
        gradient = log_p.mul_(LOG2_E).exp2_().mul_(coefficient)
        logits[rows] = gradient.scatter_add_(1, column[rows, None], at_target[rows, None])
    return logits


def _cache_blocks(logits: Tensor) -> list[slice]:
    """Rows that fit a CPU's cache, so that only the first of several passes over them reads memory."""
    rows, columns = logits.shape
    if not columns:
        return []
    size = max(CACHE_ELEMENTS // columns, 1)
    return [slice(start, start + size) for start in range(0, rows, size)]
