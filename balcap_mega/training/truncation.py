"""What a caption is worth that was cut at the token limit (`algorithm.truncated`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import AlgorithmConfig
from balcap_mega.packing.assign import GroupLengths
from balcap_mega.rollout.rollouts import RolloutGroup


@dataclass(frozen=True)
class TrainedOn:
    """The captions that a step's loss is of, group after group: N' of the N that were sampled.

    advantages: of these N'
    numbers:    for each, which of the N it is, ascending
    """

    groups: Sequence[RolloutGroup]
    advantages: Advantages
    numbers: Sequence[int]


def _chosen(group: RolloutGroup, config: AlgorithmConfig) -> list[int]:
    """The numbers of the group's captions that the loss is of: under `mask` the finished ones, or else the first."""
    everything = range(len(group.rollouts))
    if config.truncated == "score":
        return list(everything)
    return [number for number in everything if group.rollouts[number].finished] or [0]


def lengths(group: RolloutGroup, config: AlgorithmConfig) -> GroupLengths:
    """What its row will be assigned by."""
    captions = (group.rollouts[number].token_ids for number in _chosen(group, config))
    return GroupLengths(len(group.prompt_token_ids), tuple(map(len, captions)))


def without_truncated(groups: Sequence[RolloutGroup], advantages: Advantages, config: AlgorithmConfig) -> TrainedOn:
    """What the loss is of: all captions, or under `mask` the finished ones.

    A group without a finished caption keeps its first, at advantage 0: no policy gradient comes of it, and an update
    of a batch that was cut throughout is still one of something.
    """
    if config.truncated == "score":
        return TrainedOn(groups, advantages, range(len(advantages.values)))
    kept, numbers, nothing = [], [], []
    first = 0
    for group in groups:
        chosen = _chosen(group, config)
        if not group.rollouts[chosen[0]].finished:
            nothing.append(len(numbers))
        kept.append(replace(group, rollouts=tuple(group.rollouts[number] for number in chosen)))
        numbers += [first + number for number in chosen]
        first += len(group.rollouts)
    index = torch.tensor(numbers, device=advantages.values.device)
    values = advantages.values[index]
    values[nothing] = 0.0
    left = Advantages(values, advantages.per_component[:, index], advantages.gated[index])
    return TrainedOn(kept, left, numbers)
