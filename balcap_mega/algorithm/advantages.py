"""Rewards of a whole global batch to one advantage a rollout."""

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import Advantages, RewardBatch
from balcap_mega.algorithm.dispatch import use_kernels
from balcap_mega.algorithm.length_gate import control_length, controlled_components
from balcap_mega.config.schema import AlgorithmConfig

EPSILON = 1e-4


def component_weights(names: tuple[str, ...], config: AlgorithmConfig) -> dict[str, float]:
    """The weight of each component by its name, in their order; one that the config does not name weighs 1."""
    return {name: config.weights.get(name, 1.0) for name in names}


def compute_advantages(rewards: RewardBatch, config: AlgorithmConfig) -> Advantages:
    """Length control, group-wise normalisation, weighted sum and whitening over the batch, in that order.

    gdpo (arXiv 2605.07394, 2601.05242), each component k on its own, over the valid members of a rollout's group:

        A[k, i] = (r[k, i] − mean_k) / (std_k + ε)          A[i] = Σ_k w_k · A[k, i]

    then, if `config.whiten`, A ← (A − mean) / (std + ε) over all rollouts that have a component of positive weight, per
    sequence and never per token. A missing value contributes 0 and leaves the statistics alone.

    grpo (arXiv 2402.03300), the weighted sum first and one normalisation, without whitening:

        A[i] = Σ_k w_k · (r[k, i] − mean_k) / (std(Σ_k w_k · r[k]) + ε)

    A rollout that lacks a component of positive weight has no sum: its advantage is 0 and the others' statistics do
    without it. In both modes std is unbiased, ε = 1e-4, a group with fewer than two valid members or without spread
    gives exactly 0, and the values are Σ_k w_k · per_component before whitening.

    The statistics are taken in float64, which makes "without spread gives exactly 0" exact for float32 rewards.
    On CUDA one kernel does all of it, in float32, with the same guarantee.
    """
    if use_kernels(rewards.values):
        return _kernel_advantages(rewards, config)
    rewards, gated = control_length(rewards, config)
    weights = list(component_weights(rewards.names, config).values())
    weights = torch.tensor(weights, dtype=torch.float64, device=rewards.values.device)
    used = (weights > 0)[:, None]
    if config.normalization == "gdpo":
        scored = (rewards.valid & used).any(dim=0)
        deviations = _group_deviations(rewards.values, rewards.valid, rewards.group_ids)
        per_component = deviations / (_group_std(deviations, rewards.valid, rewards.group_ids) + EPSILON)
    else:
        scored = (rewards.valid | ~used).all(dim=0)
        deviations = _group_deviations(rewards.values, rewards.valid & scored, rewards.group_ids)
        total = (weights @ deviations)[None]
        per_component = deviations / (_group_std(total, scored[None], rewards.group_ids) + EPSILON)
    values = weights @ per_component
    if config.normalization == "gdpo" and config.whiten:
        values = _whiten(values, scored)
    return Advantages(values=values.float(), per_component=per_component.float(), gated=gated)


def _kernel_advantages(rewards: RewardBatch, config: AlgorithmConfig) -> Advantages:
    from balcap_mega.kernels.advantages import advantages

    values, per_component, gated = advantages(
        rewards.values,
        rewards.valid,
        rewards.lengths,
        rewards.reference_lengths,
        rewards.group_ids,
        weights=tuple(component_weights(rewards.names, config).values()),
        sum_first=config.normalization == "grpo",
        whiten=config.normalization == "gdpo" and config.whiten,
        length_control=config.length_control,
        controlled=controlled_components(rewards.names, config),
        lower=config.gate.lower,
        upper=config.gate.upper,
        penalty=config.linear_penalty,
        epsilon=EPSILON,
    )
    return Advantages(values, per_component, gated)


def _group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    """[K, N] to the sum over each rollout's group, back at each rollout: [K, N]."""
    groups = int(group_ids.max()) + 1 if group_ids.numel() else 0
    sums = values.new_zeros(values.shape[0], groups).index_add_(1, group_ids, values)
    return sums[:, group_ids]


def _group_deviations(values: Tensor, valid: Tensor, group_ids: Tensor) -> Tensor:
    """r − mean over the group's valid members, [K, N] float64; 0 at a missing entry, whatever stands there."""
    values = torch.where(valid, values, 0.0).double()
    mean = _group_sum(values, group_ids) / _group_sum(valid.double(), group_ids).clamp(min=1)
    return torch.where(valid, values - mean, 0.0)


def _group_std(deviations: Tensor, valid: Tensor, group_ids: Tensor) -> Tensor:
    count = _group_sum(valid.double(), group_ids)
    return (_group_sum(deviations.square(), group_ids) / (count - 1).clamp(min=1)).sqrt()


def _whiten(values: Tensor, scored: Tensor) -> Tensor:
    count = scored.sum()
    mean = (values * scored).sum() / count.clamp(min=1)
    deviations = torch.where(scored, values - mean, 0.0)
    std = (deviations.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return deviations / (std + EPSILON)
