"""Length control: what a caption's length does to some of its rewards, before any normalisation."""

from dataclasses import replace

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.config.schema import AlgorithmConfig


def controlled_components(names: tuple[str, ...], config: AlgorithmConfig) -> tuple[bool, ...]:
    """Of each component, whether length control acts on it."""
    return tuple(config.length_control != "none" and name in config.gate.components for name in names)


def length_ratios(rewards: RewardBatch) -> Tensor:
    """ρ = length(caption) / length(reference), [N] float64. An empty reference counts as one unit long."""
    return rewards.lengths.double() / rewards.reference_lengths.double().clamp(min=1)


def control_length(rewards: RewardBatch, config: AlgorithmConfig) -> tuple[RewardBatch, Tensor]:
    """Return the rewards after length control, and which rollouts the gate closed on, [N] bool.

    It acts on the components that `config.gate.components` names, each reward r of which becomes:

    gate:   a real 0, not missing, where ρ lies outside [lower, upper] (bounds inclusive): BalCapRL's length-conditional
            reward masking, which the paper applies to linguistic. A score whose judge failed is a real 0 there too.
    linear: r − linear_penalty · |ρ − 1|, the baseline that BalCapRL compares with; its exact form is not published, and
            this one is ours.
    none:   r as it is.
    """
    ratios = length_ratios(rewards)
    untouched = torch.zeros_like(ratios, dtype=torch.bool)
    controlled = controlled_components(rewards.names, config)
    if not any(controlled):
        return rewards, untouched
    acts_on = torch.tensor(controlled, device=ratios.device)[:, None]
    if config.length_control == "linear":
        penalty = (config.linear_penalty * (ratios - 1).abs()).to(rewards.values.dtype)
        return replace(rewards, values=torch.where(acts_on, rewards.values - penalty, rewards.values)), untouched
    gated = (ratios < config.gate.lower) | (ratios > config.gate.upper)
    zeroed = acts_on & gated
    return replace(rewards, values=rewards.values.masked_fill(zeroed, 0.0), valid=rewards.valid | zeroed), gated
