"""The LM head without logits: vocabulary-parallel, a chunk of tokens at a time.

Every function takes the R hidden rows that predict response tokens, the same on all tensor-parallel ranks, and this
rank's shard of the head. The gradient with respect to the rows is this rank's PARTIAL one: reduce it with Megatron's
own operators, `copy_to_tensor_model_parallel_region(hidden[rows])`, or under sequence parallelism
`gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)` before the rows are picked.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.algorithm.logits import Chunk, HeadShard, logit_chunks, logits_to_gradient_
from balcap_mega.algorithm.metrics import PolicyMetrics
from balcap_mega.algorithm.policy_loss import (
    PolicyLoss,
    TokenTerms,
    loss_normaliser,
    needs_whole_sequences,
    policy_loss,
    policy_loss_terms,
    token_count,
)
from balcap_mega.config.schema import AlgorithmConfig

logger = logging.getLogger(__name__)


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
    gradient at once and are never computed again. A sequence-level ratio, or importance by sequence, needs the whole
    sequence first: it falls back to `token_logprobs`, which recomputes them.
    """
    if needs_whole_sequences(config):
        _say_fallback("ratio_level=sequence" if config.ratio_level == "sequence" else "importance=sequence_band")
        logprobs, entropy = token_logprobs(hidden, tokens.targets, head)
        return policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=max_response_length)

    old = torch.empty_like(tokens.rollout_logprobs) if tokens.old_logprobs is None else tokens.old_logprobs

    def objective(logprobs: Tensor, entropy: Tensor, rows: slice) -> TokenTerms:
        if tokens.old_logprobs is None:
            old[rows] = logprobs
        return policy_loss_terms(
            logprobs, tokens[rows], config, entropy=entropy, max_response_length=max_response_length
        )

    loss_sum, metrics = _fused_loss(hidden, tokens.targets, head, objective)
    return PolicyLoss(loss_sum, loss_normaliser(tokens, config, max_response_length), metrics, old)


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
def _say_fallback(option: str) -> None:
    logger.warning("algorithm.%s: the fused LM head recomputes its logits (four GEMMs, not three)", option)


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

    def add(self, chunk: Chunk, d_logprobs: Tensor, d_entropy: Tensor | None) -> None:
        d_logits, columns = logits_to_gradient_(chunk, d_logprobs, d_entropy, self.head), self.head.columns
        if self.hidden is not None:
            torch.mm(d_logits, self.head.weight[:columns], out=self.hidden[chunk.rows])
        if self.weight is not None and columns:
            accumulate_(self.weight[:columns], d_logits, chunk.hidden)

    def weight_for_autograd(self) -> Tensor | None:
        if self.weight is None:
            return None
        if not self.in_main_grad:
            return self.weight.to(self.head.weight.dtype)
        weight = self.head.weight
        weight.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue] (for Megatron's hook)
        # Megatron's hook adds this to main_grad only for an embedding tied to the head, which asks for zeros.
        placeholder = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
        return placeholder(weight)


def accumulate_(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
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
        for chunk in logit_chunks(hidden, targets, head):
            terms = objective(chunk.statistics.logprobs, chunk.statistics.entropy, chunk.rows)
            loss_sum, metrics = loss_sum + terms.loss_sum, metrics + terms.metrics
            if gradients is not None:
                gradients.add(chunk, terms.d_logprobs, terms.d_entropy)
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
        for chunk in logit_chunks(hidden, targets, head):
            logprobs[chunk.rows], entropy[chunk.rows] = chunk.statistics.logprobs, chunk.statistics.entropy
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
        for chunk in logit_chunks(hidden, targets, head):
            gradients.add(chunk, d_logprobs[chunk.rows], None if d_entropy is None else d_entropy[chunk.rows])
        return gradients.hidden, gradients.weight_for_autograd(), None, None
