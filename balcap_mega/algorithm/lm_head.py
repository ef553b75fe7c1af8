"""The LM head without logits: vocabulary-parallel, a chunk of tokens at a time.

Every function takes the R hidden rows that predict response tokens, the same on all tensor-parallel ranks, and this
rank's shard of the head. The gradient with respect to the rows is this rank's PARTIAL one: reduce it with Megatron's
own operators, `copy_to_tensor_model_parallel_region(hidden[rows])`, or under sequence parallelism
`gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)` before the rows are picked.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.algorithm.dispatch import use_kernels
from balcap_mega.algorithm.metrics import PolicyMetrics
from balcap_mega.algorithm.policy_loss import PolicyLoss, loss_normaliser, policy_loss, token_count
from balcap_mega.config.schema import AlgorithmConfig

logger = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 2**28, "cuda": 7 * 2**27}
TILE_ROWS = 128
ROW_ALIGNMENT = 64


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
        """Even chunks of at most `chunk_bytes` of logits, in whole GEMM tiles where there is room for one."""
        row_bytes = self.weight.shape[0] * self.weight.element_size()
        limit = max((self.chunk_bytes or CHUNK_BYTES[self.weight.device.type]) // row_bytes, 1)
        limit -= limit % TILE_ROWS if limit > TILE_ROWS else 0
        size = -(-rows // max(-(-rows // limit), 1))
        if size > TILE_ROWS:
            size += -size % TILE_ROWS
        return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]

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
class TokenTerms:
    """An objective at the T tokens of a chunk: its sum, metrics, and its derivatives by logprob and entropy, [T]."""

    loss_sum: Tensor
    metrics: PolicyMetrics
    d_logprobs: Tensor
    d_entropy: Tensor | None


# From a chunk's logprobs and entropies, [T] each, and the rows it holds.
Objective = Callable[[Tensor, Tensor, slice], TokenTerms]


def token_logprobs(hidden: Tensor, targets: Tensor, head: HeadShard) -> tuple[Tensor, Tensor]:
    """Logprob of each target and entropy of its distribution, [R] float32 each; hidden [R, H], targets [R].

    Differentiable in both; the backward pass computes the logits a second time (four GEMMs in all). Under
    `torch.no_grad()` this is the forward-only variant for old and reference logprobs.
    """
    return _TokenLogprobs.apply(hidden, head.weight, targets, head)


def fused_policy_loss(
    hidden: Tensor,
    tokens: TokenBatch,
    head: HeadShard,
    config: AlgorithmConfig,
    *,
    max_response_length: int | None = None,
) -> PolicyLoss:
    """`policy_loss` of the head's logprobs, forward and backward in one pass over the logits: three GEMMs.

    With a token-level ratio dL/dlogp of a token depends on that token alone, so a chunk's logits turn into their
    gradient at once and are never computed again. A sequence-level ratio needs the whole sequence first: it falls back
    to `token_logprobs`, which recomputes them.
    """
    if config.ratio_level == "sequence":
        _say_fallback()
        logprobs, entropy = token_logprobs(hidden, tokens.targets, head)
        return policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=max_response_length)

    def objective(logprobs: Tensor, entropy: Tensor, rows: slice) -> TokenTerms:
        with torch.enable_grad():
            logprobs, entropy = logprobs.requires_grad_(), entropy.requires_grad_(config.entropy_weight > 0)
            loss = policy_loss(
                logprobs, _slice(tokens, rows), config, entropy=entropy, max_response_length=max_response_length
            )
            inputs = (logprobs, entropy) if entropy.requires_grad else (logprobs,)
            gradients = (*torch.autograd.grad(loss.loss_sum, inputs), None)
        return TokenTerms(loss.loss_sum.detach(), loss.metrics, gradients[0], gradients[1])

    loss_sum, metrics = _fused_loss(hidden, tokens.targets, head, objective)
    return PolicyLoss(loss_sum, loss_normaliser(tokens, config, max_response_length), metrics)


def fused_cross_entropy(hidden: Tensor, targets: Tensor, head: HeadShard) -> PolicyLoss:
    """The supervised objective Σ_t −logp_t over the same single pass; the normaliser is the number of tokens."""

    def objective(logprobs: Tensor, entropy: Tensor, rows: slice) -> TokenTerms:
        metrics = PolicyMetrics.zero(logprobs.device)
        metrics.sums[0], metrics.sums[-1] = logprobs.numel(), entropy.sum()
        return TokenTerms(-logprobs.sum(), metrics, torch.full_like(logprobs, -1.0), None)

    loss_sum, metrics = _fused_loss(hidden, targets, head, objective)
    return PolicyLoss(loss_sum, token_count(targets), metrics)


def _fused_loss(hidden: Tensor, targets: Tensor, head: HeadShard, objective: Objective) -> tuple[Tensor, PolicyMetrics]:
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or head.weight.requires_grad)
    loss_sum, sums, maxima = _FusedLoss.apply(hidden, head.weight, targets, head, objective, differentiate)
    return loss_sum, PolicyMetrics(sums, maxima)


@cache
def _say_fallback() -> None:
    logger.warning("algorithm.ratio_level=sequence: the fused LM head recomputes its logits (four GEMMs, not three)")


def _slice(tokens: TokenBatch, rows: slice) -> TokenBatch:
    columns = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    return TokenBatch(**{name: None if column is None else column[rows] for name, column in columns.items()})


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


def chunk_logits(hidden: Tensor, head: HeadShard, buffer: Tensor) -> Tensor:
    """[T, columns] at the start of the buffer, temperature not yet applied, padded columns left out."""
    return torch.mm(hidden, head.weight[: head.columns].t(), out=buffer[: hidden.shape[0]])


def statistics(logits: Tensor, targets: Tensor, head: HeadShard) -> LogitStatistics:
    """Local max, Σ exp, Σ z exp and target logit of each row, merged over the group in one small all-gather."""
    if use_kernels(logits):
        from balcap_mega.kernels.lm_head import logit_statistics

        return merge_statistics(logit_statistics(logits, targets, head.first_column, head.temperature), head.group)
    if not head.columns:  # a shard of padding only
        local = torch.zeros(4, targets.numel(), device=logits.device)
        local[0] = -torch.inf
        return merge_statistics(local, head.group)
    scale = 1 / head.temperature
    logits = logits.float()
    maximum = logits.amax(dim=1) * scale
    weights = torch.add(-maximum[:, None], logits, alpha=scale).exp_()
    moment = torch.linalg.vecdot(weights, logits) * scale
    column, owned = head.column_of(targets)
    target = torch.where(owned, logits.gather(1, column[:, None])[:, 0] * scale, 0.0)
    return merge_statistics(torch.stack((maximum, weights.sum(dim=1), moment, target)), head.group)


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


def logits_to_gradient_(
    logits: Tensor,
    targets: Tensor,
    found: LogitStatistics,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    head: HeadShard,
) -> Tensor:
    """Overwrite logits with their gradient, p the softmax and z the tempered logits of a row:

    d z_j = d_logp · (1[j = target] − p_j) − d_H · p_j · (log p_j + H),        d logit_j = d z_j / temperature
    """
    if use_kernels(logits):
        from balcap_mega.kernels import lm_head

        return lm_head.logits_to_gradient_(
            logits, targets, found.log_normaliser, found.entropy, d_logprobs, d_entropy,
            head.first_column, head.temperature,
        )  # fmt: skip
    if not head.columns:
        return logits
    scale = 1 / head.temperature
    d_logprobs = d_logprobs * scale
    log_p = torch.add(-found.log_normaliser[:, None], logits.float(), alpha=scale)
    coefficient = -d_logprobs[:, None]
    if d_entropy is not None:
        coefficient = coefficient - (d_entropy * scale)[:, None] * (log_p + found.entropy[:, None])
    gradient = log_p.exp_().mul_(coefficient)
    column, owned = head.column_of(targets)
    gradient.scatter_add_(1, column[:, None], torch.where(owned, d_logprobs, 0.0)[:, None])
    return logits.copy_(gradient)


class _Gradients:
    """Collects d hidden, a chunk of rows at a time, and d weight, accumulated in float32 over the chunks.

    Where Megatron's float32 main gradient is there, d weight goes straight into it, as gradient accumulation fusion
    does, and autograd sees the placeholder that Megatron's own linear layer would return.
    """

    def __init__(self, hidden: Tensor, head: HeadShard, needs_hidden: bool, needs_weight: bool):
        weight = head.weight
        main_grad = getattr(weight, "main_grad", None)
        self.head = head
        self.in_main_grad = needs_weight and main_grad is not None and main_grad.dtype == torch.float32
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight = None
        if self.in_main_grad:
            self.weight = main_grad
        elif needs_weight:
            self.weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def add(self, rows: slice, hidden: Tensor, d_logits: Tensor) -> None:
        columns = self.head.columns
        if self.hidden is not None:
            torch.mm(d_logits, self.head.weight[:columns], out=self.hidden[rows])
        if self.weight is not None and columns:
            _accumulate(self.weight[:columns], d_logits, hidden)

    def weight_for_autograd(self) -> Tensor | None:
        if self.weight is None:
            return None
        if not self.in_main_grad:
            return self.weight.to(self.head.weight.dtype)
        weight = self.head.weight
        weight.grad_added_to_main_grad = True
        # Megatron's hook adds this to main_grad only for an embedding tied to the head, which asks for zeros.
        placeholder = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return placeholder(weight)


def _accumulate(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logitsᵀ hidden, in float32 whatever the operands' dtype."""
    if hidden.dtype == torch.float32:
        total.addmm_(d_logits.t(), hidden)
    elif hidden.is_cuda:
        torch.addmm(total, d_logits.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total += d_logits.t() @ hidden


class _FusedLoss(torch.autograd.Function):
    """Loss and both gradients in the forward pass; the backward pass hands them over, scaled by its incoming gradient.

    A gradient that is already in `main_grad` cannot be scaled any more: there the incoming gradient must be 1, as it is
    when the loss is the root of the backward pass and no loss scaling is on (float32 and bfloat16 need none).
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, head: HeadShard, objective: Objective, differentiate: bool):
        loss_sum, metrics = hidden.new_zeros((), dtype=torch.float32), PolicyMetrics.zero(hidden.device)
        gradients = None
        if differentiate:
            gradients = _Gradients(hidden, head, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        chunks = head.chunks(hidden.shape[0])
        buffer = head.logits_buffer(chunks)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], head, buffer)
            found = statistics(logits, targets[rows], head)
            terms = objective(found.logprobs, found.entropy, rows)
            loss_sum, metrics = loss_sum + terms.loss_sum, metrics + terms.metrics
            if gradients is not None:
                d_logits = logits_to_gradient_(logits, targets[rows], found, terms.d_logprobs, terms.d_entropy, head)
                gradients.add(rows, hidden[rows], d_logits)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(metrics.sums, metrics.maxima)
        return loss_sum, metrics.sums, metrics.maxima

    @staticmethod
    def backward(ctx, d_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        d_hidden, d_weight = gradients.hidden, gradients.weight_for_autograd()
        if gradients.in_main_grad:
            torch._assert_async(d_loss == 1)
        elif d_weight is not None:
            d_weight = d_weight.mul_(d_loss)
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(d_loss)
        return d_hidden, d_weight, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head: HeadShard):
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        chunks = head.chunks(hidden.shape[0])
        buffer = head.logits_buffer(chunks)
        for rows in chunks:
            found = statistics(chunk_logits(hidden[rows], head, buffer), targets[rows], head)
            logprobs[rows], entropy[rows] = found.logprobs, found.entropy
        ctx.save_for_backward(hidden, weight, targets)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, d_logprobs, d_entropy):
        hidden, _, targets = ctx.saved_tensors
        head = ctx.head
        if d_logprobs is None:
            d_logprobs = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        gradients = _Gradients(hidden, head, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        chunks = head.chunks(hidden.shape[0])
        buffer = head.logits_buffer(chunks)
        for rows in chunks:
            logits = chunk_logits(hidden[rows], head, buffer)
            found = statistics(logits, targets[rows], head)
            d_rows = None if d_entropy is None else d_entropy[rows]
            d_logits = logits_to_gradient_(logits, targets[rows], found, d_logprobs[rows], d_rows, head)
            gradients.add(rows, hidden[rows], d_logits)
        return gradients.hidden, gradients.weight_for_autograd(), None, None
