"""The clipped policy-gradient objective, from the logprobs of response tokens to a scalar."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.algorithm.dispatch import use_kernels
from balcap_mega.algorithm.metrics import PolicyMetrics
from balcap_mega.config.schema import AlgorithmConfig

# exp() of a larger difference of logprobs says nothing any more, and its overflow would turn a zero advantage into NaN.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyLoss:
    """One microbatch's share of the objective.

    loss_sum:   scalar float32, differentiable, not normalised
    normaliser: scalar int64. The step's loss is Σ loss_sum / Σ normaliser over microbatches and data-parallel ranks, so
                its gradient does not depend on how the step was split (Megatron: `calculate_per_token_loss=True`)
    metrics:    detached
    old_logprobs: [R] float32, detached: of its tokens under the policy that the step began with; None of an objective
                that knows no such policy
    """

    loss_sum: Tensor
    normaliser: Tensor
    metrics: PolicyMetrics
    old_logprobs: Tensor | None = None


@dataclass(frozen=True)
class TokenTerms:
    """An objective at T tokens: its sum, metrics, and its derivatives by logprob and entropy, [T]; none needs grad."""

    loss_sum: Tensor
    metrics: PolicyMetrics
    d_logprobs: Tensor
    d_entropy: Tensor | None


def policy_loss(
    logprobs: Tensor,
    tokens: TokenBatch,
    config: AlgorithmConfig,
    *,
    entropy: Tensor | None = None,
    max_response_length: int | None = None,
) -> PolicyLoss:
    """The objective of the R response tokens of one microbatch, each rollout whole in it.

        ρ_t  = exp(logp_t − old_t)               sequence level (GSPO, arXiv 2507.18071): exp(mean_t(logp_t − old_t))
        pg_t = −min(ρ_t A, clip(ρ_t, 1 − ε_low, 1 + ε_high) A)     dual clip (arXiv 1912.09729): ≤ −c A where A < 0
        w_t  = `importance_weights`, constants                     for what sampled the tokens
        k3_t = exp(ref_t − logp_t) − (ref_t − logp_t) − 1          an unbiased estimate of KL(policy ‖ reference)
        l_t  = w_t pg_t + β k3_t − β_H H_t

    loss_sum and normaliser by `config.aggregation`:

        token_mean       Σ_t l_t,                 number of tokens                    (DAPO, arXiv 2503.14476)
        sequence_mean    Σ_i (1 / |o_i|) Σ_t l_t, number of sequences                 (GRPO, arXiv 2402.03300)
        constant_length  Σ_t l_t,                 number of sequences × L_max         (Dr. GRPO, arXiv 2503.20783)

    Args:
        logprobs: [R] under the current policy, with gradient
        entropy: [R] of the current policy; with gradient where `config.entropy_weight` is positive, which requires it
        max_response_length: L_max, required by constant_length
    """
    if use_kernels(logprobs):
        from balcap_mega.kernels.policy_loss import PolicyLoss as KernelPolicyLoss

        objective = _kernel_objective(config, max_response_length)
        loss_sum, normaliser, sums, maxima = KernelPolicyLoss.apply(
            logprobs, entropy, *_kernel_inputs(logprobs, tokens), objective
        )
        return PolicyLoss(loss_sum, normaliser, PolicyMetrics(sums, maxima), old_or_current(logprobs, tokens))
    old_logprobs = old_or_current(logprobs, tokens)
    log_ratio = logprobs - old_logprobs
    if config.ratio_level == "sequence":
        log_ratio = _sequence_mean(log_ratio, tokens)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()

    advantages = tokens.advantages[tokens.sequence_ids]
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = torch.where(advantages > 0, ratio > 1 + config.clip_high, ratio < 1 - config.clip_low) & (advantages != 0)
    dual_clipped = torch.zeros_like(clipped)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        dual_clipped = (advantages < 0) & (objective < floor)
        objective = torch.where(dual_clipped, floor, objective)

    engine_difference = old_logprobs - tokens.rollout_logprobs
    importance, cut = importance_weights(engine_difference, tokens, config)
    loss = -importance * objective

    kl_reference = torch.zeros_like(loss)
    if tokens.reference_logprobs is not None:
        difference = (tokens.reference_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl_reference = difference.exp() - difference - 1
        loss = loss + config.kl_weight * kl_reference
    if config.entropy_weight > 0:
        if entropy is None:
            raise ValueError("entropy_weight above 0 needs the entropy")
        loss = loss - config.entropy_weight * entropy
    if config.aggregation == "sequence_mean":
        loss = loss / tokens.sequence_lengths

    columns = (
        torch.ones_like(ratio), clipped, dual_clipped, kl_reference, ratio - 1 - log_ratio, importance, cut,
        engine_difference.abs(), torch.zeros_like(ratio) if entropy is None else entropy,
    )  # fmt: skip
    return PolicyLoss(
        loss_sum=loss.sum(),
        normaliser=loss_normaliser(tokens, config, max_response_length),
        metrics=PolicyMetrics(
            sums=torch.stack([column.detach().float().sum() for column in columns]),
            maxima=torch.stack([_maximum(ratio.detach()), _maximum(engine_difference.abs())]),
        ),
        old_logprobs=old_logprobs,
    )


def old_or_current(logprobs: Tensor, tokens: TokenBatch) -> Tensor:
    """[R] logprobs of the policy the step began with; before the first update that is the current one, detached."""
    return logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs


def importance_weights(log_weights: Tensor, tokens: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """What each token's policy gradient is multiplied by, [R], and where the bound of that is active, [R] bool.

    The policy that sampled is not the one an update begins with (`old`): the engine computes otherwise, and with
    `rollout.ahead` it had weights one update older. With k_t = exp(old_t − rollout_t), and m the mean over a sequence:

        truncate       w_t = min(k_t, C)                                    (truncated importance sampling,
                                                                            as TRL's token_truncate)
        token_band     w_t = k_t where a <= k_t <= b, else 0                (IcePop, arXiv 2510.18855)
        sequence_band  w_t = min(k_t, C) where a <= exp(m(log k)) <= b, else 0
                                            (by geometric mean, as NeMo RL's seq-mask-tis and verl's rollout_rs)

    min(k_t, C) is 1 where C is None. A token that is left out still counts in the loss's divisor, and in its KL and
    entropy terms. This is the decoupled objective of arXiv 2110.00641: `old` is the proximal policy that the ratio is
    clipped around, and w corrects from the behaviour policy to it.
    """
    if config.importance == "token_band":
        lower, upper = map(math.log, config.importance_token_band)
        outside = (log_weights < lower) | (log_weights > upper)
        return torch.where(outside, 0.0, log_weights.clamp(max=upper).exp()), outside
    if config.importance_cap is None:
        weights, cut = torch.ones_like(log_weights), torch.zeros_like(log_weights, dtype=torch.bool)
    else:
        limit = math.log(config.importance_cap)
        weights, cut = log_weights.clamp(max=limit).exp(), log_weights > limit
    if config.importance == "sequence_band":
        lower, upper = map(math.log, config.importance_sequence_band)
        mean = _sequence_mean(log_weights, tokens)
        outside = (mean < lower) | (mean > upper)
        return torch.where(outside, 0.0, weights), cut | outside
    return weights, cut


def needs_whole_sequences(config: AlgorithmConfig) -> bool:
    """Whether a token's loss depends on the other tokens of its sequence."""
    return config.ratio_level == "sequence" or config.importance == "sequence_band"


def loss_normaliser(tokens: TokenBatch, config: AlgorithmConfig, max_response_length: int | None = None) -> Tensor:
    """What this microbatch adds to the divisor of the step's loss, scalar int64; see `policy_loss`."""
    if config.aggregation == "token_mean":
        return token_count(tokens.targets)
    sequences = _starts(tokens.sequence_ids).sum()
    if config.aggregation == "sequence_mean":
        return sequences
    if max_response_length is None:
        raise ValueError("aggregation=constant_length needs max_response_length")
    return sequences * max_response_length


def token_count(targets: Tensor) -> Tensor:
    """Scalar int64 on the targets' device, put there without a copy from the host."""
    return torch.full((), targets.numel(), dtype=torch.int64, device=targets.device)


def policy_loss_terms(
    logprobs: Tensor,
    tokens: TokenBatch,
    config: AlgorithmConfig,
    *,
    entropy: Tensor,
    max_response_length: int | None = None,
) -> TokenTerms:
    """`policy_loss` of T tokens with its derivatives at once, for a pass over the logits that is in the middle of its
    own backward pass. Unless it `needs_whole_sequences`, the tokens may be any of a microbatch's. Kernels do it in
    one launch.
    """
    with_entropy = config.entropy_weight > 0
    if use_kernels(logprobs):
        from balcap_mega.kernels.policy_loss import policy_loss_terms as kernel_terms

        objective = _kernel_objective(config, max_response_length)
        terms = kernel_terms(
            logprobs, entropy, *_kernel_inputs(logprobs, tokens), objective, differentiate_entropy=with_entropy
        )
        return TokenTerms(terms.loss_sum, PolicyMetrics(terms.sums, terms.maxima), terms.d_logprobs, terms.d_entropy)
    with torch.enable_grad():
        logprobs, entropy = logprobs.requires_grad_(), entropy.requires_grad_(with_entropy)
        loss = policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=max_response_length)
        inputs = (logprobs, entropy) if with_entropy else (logprobs,)
        gradients = (*torch.autograd.grad(loss.loss_sum, inputs), None)
    return TokenTerms(loss.loss_sum.detach(), loss.metrics, gradients[0], gradients[1])


def _kernel_objective(config: AlgorithmConfig, max_response_length: int | None):
    from balcap_mega.kernels.policy_loss import Objective

    if config.aggregation == "constant_length" and max_response_length is None:
        raise ValueError("aggregation=constant_length needs max_response_length")
    counts = {"token_mean": 0, "sequence_mean": 1, "constant_length": max_response_length}
    return Objective(
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        kl_weight=config.kl_weight,
        importance=config.importance,
        importance_cap=config.importance_cap,
        importance_band=_band(config),
        sequence_ratio=config.ratio_level == "sequence",
        entropy_weight=config.entropy_weight,
        mean_over_sequence=config.aggregation == "sequence_mean",
        sequence_count=counts[config.aggregation],
        max_log_ratio=MAX_LOG_RATIO,
    )


def _band(config: AlgorithmConfig) -> tuple[float, float]:
    return config.importance_token_band if config.importance == "token_band" else config.importance_sequence_band


def _kernel_inputs(
    logprobs: Tensor, tokens: TokenBatch
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    return (
        old_or_current(logprobs, tokens), tokens.rollout_logprobs, tokens.reference_logprobs, tokens.advantages,
        tokens.sequence_ids, tokens.token_index, tokens.sequence_lengths,
    )  # fmt: skip


def _starts(sequence_ids: Tensor) -> Tensor:
    """[R] bool, True at the first token of each sequence."""
    starts = torch.ones_like(sequence_ids, dtype=torch.bool)
    starts[1:] = sequence_ids[1:] != sequence_ids[:-1]
    return starts


def _sequence_mean(values: Tensor, tokens: TokenBatch) -> Tensor:
    """The mean over each token's sequence, back at each token; [R] to [R], differentiable, without a device sync."""
    index = _starts(tokens.sequence_ids).cumsum(0) - 1
    return (torch.zeros_like(values).index_add(0, index, values))[index] / tokens.sequence_lengths


def _maximum(values: Tensor) -> Tensor:
    return values.float().amax() if values.numel() else values.new_zeros((), dtype=torch.float32)
