"""Logprobs to the clipped policy-gradient loss, its derivative and its metrics in one launch.

Formulas: PPO's clip (arXiv 1707.06347), dual clip (arXiv 1912.09729), k3 (http://joschu.net/blog/kl-approx.html),
and the importance weights w, as written out in `balcap_mega.algorithm.policy_loss.policy_loss`, which is the
reference and calls this on CUDA. With ρ = exp(logp − old), g the aggregation's weight of the token (1 or 1 / |o|):

    d loss / d logp = g · (−w A ρ [neither clip is active] + β (1 − exp(ref − logp))),      d loss / d H = −g β_H

With a sequence-level ratio (arXiv 2507.18071) log ρ is the mean of logp − old over the sequence, and so is w above.
Importance by sequence likewise reads the mean of old − rollout over it.

Tokens are a flat list, sequences of any length one after another; each looks its advantage A up by its sequence. Each
program leaves its partial sums in a row of scratch; the last one adds the rows up in order.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcap_mega.kernels.last_program import arrival_counter, is_last_program

BLOCK = 512
NUM_WARPS = 4
REDUCE_ROWS = 128
# The sums: tokens, clipped, dual clipped, k3 to the reference, k3 to the old policy, importance weight, cut weights,
# |old − rollout|, entropy.
SUM_COLUMNS = 9
# A scratch row holds them, then the loss, the sequences that begin, the maxima of the ratio and of |old − rollout|.
SCRATCH_COLUMNS = 16
# As the kernel is told of `Objective.importance`.
IMPORTANCE = {"truncate": 0, "token_band": 1, "sequence_band": 2}
TOKEN_BAND = tl.constexpr(IMPORTANCE["token_band"])
SEQUENCE_BAND = tl.constexpr(IMPORTANCE["sequence_band"])


@dataclass(frozen=True)
class Objective:
    """The numbers of the objective, as `AlgorithmConfig` names them; None turns a term off.

    sequence_ratio: ρ is that of the whole sequence, whose tokens must then all be there, as for importance by sequence
    sequence_count: what a sequence adds to the normaliser; 0 where tokens are counted instead
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_weight: float
    importance: str
    importance_cap: float | None
    importance_band: tuple[float, float]
    sequence_ratio: bool
    entropy_weight: float
    mean_over_sequence: bool
    sequence_count: int
    max_log_ratio: float


@triton.jit
def _token_weights(engine, log_cap, log_lower, log_upper, CAPPED: tl.constexpr, IMPORTANCE: tl.constexpr):
    """Importance of tokens with log weights `engine`, and where it was cut, before any sequence is left out."""
    weight = tl.full(engine.shape, 1.0, tl.float32)
    cut = tl.zeros(engine.shape, dtype=tl.int1)
    if IMPORTANCE == TOKEN_BAND:
        cut = (engine < log_lower) | (engine > log_upper)
        weight = tl.where(cut, 0.0, tl.exp(tl.minimum(engine, log_upper)))
    elif CAPPED:
        cut = engine > log_cap
        weight = tl.exp(tl.minimum(engine, log_cap))
    return weight, cut


@triton.jit
def _sequence_means(
    logprobs, old_logprobs, rollout_logprobs, first, length, log_cap, log_lower, log_upper,
    CAPPED: tl.constexpr, IMPORTANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the sequence of each token, which begins at `first`: the means of logp − old, of the weights of its tokens,
    and of old − rollout."""
    log_ratio = tl.zeros([BLOCK], dtype=tl.float32)
    weights = tl.zeros([BLOCK], dtype=tl.float32)
    engines = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(0, tl.max(length).to(tl.int32)):
        here = place < length
        old = tl.load(old_logprobs + first + place, mask=here, other=0.0)
        log_ratio += tl.load(logprobs + first + place, mask=here, other=0.0) - old
        engine = old - tl.load(rollout_logprobs + first + place, mask=here, other=0.0)
        weight, _ = _token_weights(engine, log_cap, log_lower, log_upper, CAPPED, IMPORTANCE)
        weights += tl.where(here, weight, 0.0)
        engines += engine
    count = tl.maximum(length, 1.0)
    return log_ratio / count, weights / count, engines / count


@triton.jit
def policy_loss_kernel(
    logprobs, old_logprobs, rollout_logprobs, reference_logprobs, entropy, advantages,
    sequence_ids, token_index, sequence_lengths,
    d_logprobs, d_entropy, scratch, loss_sum, normaliser, sums, maxima, counter,
    R, clip_low, clip_high, dual_clip, kl_weight, log_cap, log_lower, log_upper, entropy_weight, max_log_ratio,
    sequence_count,
    SEQUENCE_RATIO: tl.constexpr, DUAL_CLIP: tl.constexpr, REFERENCE: tl.constexpr, CAPPED: tl.constexpr,
    IMPORTANCE: tl.constexpr, ENTROPY: tl.constexpr, D_ENTROPY: tl.constexpr, SEQUENCE_MEAN: tl.constexpr,
    COUNT_SEQUENCES: tl.constexpr, SUM_COLUMNS: tl.constexpr, SCRATCH_COLUMNS: tl.constexpr,
    REDUCE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    t = program * BLOCK + tl.arange(0, BLOCK)
    inside = t < R
    logprob = tl.load(logprobs + t, mask=inside, other=0.0)
    old = tl.load(old_logprobs + t, mask=inside, other=0.0)
    sequence = tl.load(sequence_ids + t, mask=inside, other=-1)
    advantage = tl.load(advantages + sequence, mask=inside, other=0.0)

    engine = old - tl.load(rollout_logprobs + t, mask=inside, other=0.0)
    weight, cut = _token_weights(engine, log_cap, log_lower, log_upper, CAPPED, IMPORTANCE)
    unbounded = logprob - old
    d_weight = weight  # of the objective, in its derivative
    if SEQUENCE_RATIO or IMPORTANCE == SEQUENCE_BAND:
        first = t - tl.load(token_index + t, mask=inside, other=0)
        length = tl.load(sequence_lengths + t, mask=inside, other=0.0)
        mean_log_ratio, mean_weight, mean_engine = _sequence_means(
            logprobs, old_logprobs, rollout_logprobs, first, length, log_cap, log_lower, log_upper,
            CAPPED, IMPORTANCE, BLOCK,
        )  # fmt: skip
        if SEQUENCE_RATIO:
            unbounded, d_weight = mean_log_ratio, mean_weight
        if IMPORTANCE == SEQUENCE_BAND:
            outside = (mean_engine < log_lower) | (mean_engine > log_upper)
            weight = tl.where(outside, 0.0, weight)
            d_weight = tl.where(outside, 0.0, d_weight)
            cut = cut | outside
    log_ratio = tl.minimum(tl.maximum(unbounded, -max_log_ratio), max_log_ratio)
    ratio = tl.exp(log_ratio)
    clipped_ratio = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
    objective = tl.minimum(ratio * advantage, clipped_ratio * advantage)
    clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
    dual_clipped = t < 0
    if DUAL_CLIP:
        dual_clipped = (advantage < 0) & (objective < dual_clip * advantage)
        objective = tl.where(dual_clipped, dual_clip * advantage, objective)
    free = (unbounded == log_ratio) & ~clipped & ~dual_clipped

    loss = -weight * objective
    d_logprob = tl.where(free, -d_weight * advantage * ratio, 0.0)
    k3 = tl.zeros([BLOCK], dtype=tl.float32)
    if REFERENCE:
        unbounded = tl.load(reference_logprobs + t, mask=inside, other=0.0) - logprob
        difference = tl.minimum(tl.maximum(unbounded, -max_log_ratio), max_log_ratio)
        expected = tl.exp(difference)
        k3 = expected - difference - 1
        loss += kl_weight * k3
        d_logprob += kl_weight * tl.where(unbounded == difference, 1 - expected, 0.0)
    uncertainty = tl.zeros([BLOCK], dtype=tl.float32)
    if ENTROPY:
        uncertainty = tl.load(entropy + t, mask=inside, other=0.0)
        loss -= entropy_weight * uncertainty
    share = tl.full([BLOCK], 1.0, tl.float32)
    if SEQUENCE_MEAN:
        share = 1 / tl.load(sequence_lengths + t, mask=inside, other=1.0)
    tl.store(d_logprobs + t, share * d_logprob, mask=inside)
    if D_ENTROPY:
        tl.store(d_entropy + t, -entropy_weight * share, mask=inside)

    one = tl.where(inside, 1.0, 0.0)
    before = tl.load(sequence_ids + t - 1, mask=inside & (t > 0), other=-1)
    row = scratch + program * SCRATCH_COLUMNS
    tl.store(row + 0, tl.sum(one))
    tl.store(row + 1, tl.sum(tl.where(clipped, one, 0.0)))
    tl.store(row + 2, tl.sum(tl.where(dual_clipped, one, 0.0)))
    tl.store(row + 3, tl.sum(one * k3))
    tl.store(row + 4, tl.sum(one * (ratio - 1 - log_ratio)))
    tl.store(row + 5, tl.sum(one * weight))
    tl.store(row + 6, tl.sum(tl.where(cut, one, 0.0)))
    tl.store(row + 7, tl.sum(one * tl.abs(engine)))
    tl.store(row + 8, tl.sum(uncertainty))
    tl.store(row + 9, tl.sum(tl.where(inside, share * loss, 0.0)))
    tl.store(row + 10, tl.sum(tl.where(sequence != before, one, 0.0)))
    tl.store(row + 11, tl.max(one * ratio))
    tl.store(row + 12, tl.max(one * tl.abs(engine)))

    if is_last_program(counter):
        column = tl.arange(0, SCRATCH_COLUMNS)
        total = tl.zeros([SCRATCH_COLUMNS], dtype=tl.float32)
        largest = tl.zeros([SCRATCH_COLUMNS], dtype=tl.float32)
        for start in range(0, tl.num_programs(0), REDUCE_ROWS):
            partial_row = start + tl.arange(0, REDUCE_ROWS)
            partial = tl.load(
                scratch + partial_row[:, None] * SCRATCH_COLUMNS + column[None, :],
                mask=(partial_row < tl.num_programs(0))[:, None] & (column < 13)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            total += tl.sum(partial, axis=0)
            largest = tl.maximum(largest, tl.max(partial, axis=0))
        tl.store(sums + column, total, mask=column < SUM_COLUMNS)
        tl.store(maxima + column - 11, largest, mask=(column >= 11) & (column < 13))
        tl.store(loss_sum + column - 9, total, mask=column == 9)
        if COUNT_SEQUENCES:
            starts = tl.sum(tl.where(column == 10, total, 0.0))
            tl.store(normaliser, starts.to(tl.int64) * sequence_count)
        else:
            tl.store(normaliser, tl.cast(R, tl.int64))


@dataclass(frozen=True)
class Terms:
    """Scalars loss_sum (float32) and normaliser (int64); sums [SUM_COLUMNS], maxima [2]; the derivatives [R]."""

    loss_sum: Tensor
    normaliser: Tensor
    sums: Tensor
    maxima: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor | None


def policy_loss_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    token_index: Tensor,
    sequence_lengths: Tensor,
    objective: Objective,
    *,
    differentiate_entropy: bool = False,
) -> Terms:
    """The loss of R tokens and its derivatives. advantages is [N] float32 and indexed by sequence_ids; all others are
    [R], contiguous, sequence_ids and token_index int64, the rest float32.
    """
    count, device = logprobs.numel(), logprobs.device
    loss_sum = torch.empty((), dtype=torch.float32, device=device)
    normaliser = torch.empty((), dtype=torch.int64, device=device)
    sums = torch.empty(SUM_COLUMNS, dtype=torch.float32, device=device)
    maxima = torch.empty(2, dtype=torch.float32, device=device)
    d_logprobs = torch.empty_like(logprobs)
    d_entropy = torch.empty_like(logprobs) if differentiate_entropy else None
    if count == 0:
        return Terms(loss_sum.zero_(), normaliser.zero_(), sums.zero_(), maxima.zero_(), d_logprobs, d_entropy)
    programs = triton.cdiv(count, BLOCK)
    scratch = torch.empty(programs, SCRATCH_COLUMNS, dtype=torch.float32, device=device)
    dual_clip, cap = objective.dual_clip, objective.importance_cap
    log_lower, log_upper = map(math.log, objective.importance_band)
    policy_loss_kernel[(programs,)](
        logprobs, old_logprobs, rollout_logprobs, reference_logprobs, entropy, advantages,
        sequence_ids, token_index, sequence_lengths,
        d_logprobs, d_entropy, scratch, loss_sum, normaliser, sums, maxima, arrival_counter(device),
        count, objective.clip_low, objective.clip_high, 0.0 if dual_clip is None else dual_clip, objective.kl_weight,
        0.0 if cap is None else math.log(cap), log_lower, log_upper, objective.entropy_weight,
        objective.max_log_ratio, objective.sequence_count,
        SEQUENCE_RATIO=objective.sequence_ratio, DUAL_CLIP=dual_clip is not None,
        REFERENCE=reference_logprobs is not None, CAPPED=cap is not None, IMPORTANCE=IMPORTANCE[objective.importance],
        ENTROPY=entropy is not None, D_ENTROPY=differentiate_entropy, SEQUENCE_MEAN=objective.mean_over_sequence,
        COUNT_SEQUENCES=objective.sequence_count > 0, SUM_COLUMNS=SUM_COLUMNS, SCRATCH_COLUMNS=SCRATCH_COLUMNS,
        REDUCE_ROWS=REDUCE_ROWS, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return Terms(loss_sum, normaliser, sums, maxima, d_logprobs, d_entropy)


class PolicyLoss(torch.autograd.Function):
    """(loss_sum, normaliser, sums, maxima) from logprobs and entropy, which get gradients, and `policy_loss_terms`'s
    other arguments, which do not.
    """

    @staticmethod
    def forward(ctx, logprobs, entropy, old_logprobs, rollout_logprobs, reference_logprobs, advantages, sequence_ids,
                token_index, sequence_lengths, objective):  # fmt: skip
        terms = policy_loss_terms(
            logprobs, entropy, old_logprobs, rollout_logprobs, reference_logprobs, advantages, sequence_ids,
            token_index, sequence_lengths, objective, differentiate_entropy=ctx.needs_input_grad[1],
        )  # fmt: skip
        ctx.save_for_backward(terms.d_logprobs, terms.d_entropy)
        ctx.mark_non_differentiable(terms.normaliser, terms.sums, terms.maxima)
        return terms.loss_sum, terms.normaliser, terms.sums, terms.maxima

    @staticmethod
    def backward(ctx, d_loss, *_):
        d_logprobs, d_entropy = ctx.saved_tensors
        return (d_logprobs * d_loss, None if d_entropy is None else d_entropy * d_loss, *[None] * 8)
