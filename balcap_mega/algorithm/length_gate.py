"""Length control: what a caption's length does to its linguistic reward, before any normalisation."""

from dataclasses import replace

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.config.schema import AlgorithmConfig

GATED_COMPONENT = "linguistic"


def length_ratios(rewards: RewardBatch) -> Tensor:
    """ρ = length(caption) / length(reference), [N] float64. An empty reference counts as one unit long."""
    return rewards.lengths.double() / rewards.reference_lengths.double().clamp(min=1)


def control_length(rewards: RewardBatch, config: AlgorithmConfig) -> tuple[RewardBatch, Tensor]:
    """Return the rewards after length control, and which rollouts the gate closed on, [N] bool.

    gate:   linguistic becomes a real 0, not missing, where ρ lies outside [lower, upper] (bounds inclusive): BalCapRL's
            length-conditional reward masking. A linguistic score whose judge failed is a real 0 there too.
    linear: linguistic − linear_penalty · |ρ − 1|, the baseline that BalCapRL compares with; its exact form is not
            published, and this one is ours.
    none:   the rewards as they are.
    """
    ratios = length_ratios(rewards)
    untouched = torch.zeros_like(ratios, dtype=torch.bool)
    if config.length_control == "none" or GATED_COMPONENT not in rewards.names:
        return rewards, untouched
    row = rewards.names.index(GATED_COMPONENT)
    values, valid = rewards.values.clone(), rewards.valid.clone()
    if config.length_control == "linear":
        values[row] -= (config.linear_penalty * (ratios - 1).abs()).to(values.dtype)
        return replace(rewards, values=values), untouched
    gated = (ratios < config.gate.lower) | (ratios > config.gate.upper)
    values[row].masked_fill_(gated, 0.0)
    valid[row] |= gated
    return replace(rewards, values=values, valid=valid), gated
