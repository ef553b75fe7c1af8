"""What a caption is worth that was cut at the token limit (`algorithm.truncated`)."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import AlgorithmConfig
from balcap_mega.rollout.rollouts import RolloutGroup


def without_truncated(
    groups: Sequence[RolloutGroup], advantages: Advantages, config: AlgorithmConfig
) -> tuple[Sequence[RolloutGroup], Advantages]:
    """The captions that the loss is of, in order, and their advantages: all, or under `mask` the finished ones.

    A group without a finished caption keeps its first, at advantage 0: no policy gradient comes of it, and an update
    of a batch that was cut throughout is still one of something.
    """
    if config.truncated == "score":
        return groups, advantages
    kept, numbers, nothing = [], [], []
    first = 0
    for group in groups:
        finished = [number for number, rollout in enumerate(group.rollouts) if rollout.finished]
        if not finished:
            nothing.append(len(numbers))
        chosen = finished or [0]
        kept.append(replace(group, rollouts=tuple(group.rollouts[number] for number in chosen)))
        numbers += [first + number for number in chosen]
        first += len(group.rollouts)
    index = torch.tensor(numbers, device=advantages.values.device)
    values = advantages.values[index]
    values[nothing] = 0.0
    return kept, Advantages(values, advantages.per_component[:, index], advantages.gated[index])
