"""From judged captions to the reward tensors that the algorithm reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from balcap_mega.algorithm.batch import RewardBatch


@dataclass(frozen=True)
class CaptionScore:
    """Reward components of one caption by name, in [0, 1], None where missing, and two lengths in one unit."""

    components: Mapping[str, float | None]
    length: float
    reference_length: float


def build_reward_batch(groups: Sequence[Sequence[CaptionScore]]) -> RewardBatch:
    """Stack the scores of P groups (of any sizes, N > 0 captions in all) into [K, N] tensors, group after group."""
    scores = [score for group in groups for score in group]
    names = tuple(scores[0].components)
    values = [[score.components[name] for score in scores] for name in names]
    return RewardBatch(
        names=names,
        values=torch.tensor([[0.0 if value is None else value for value in row] for row in values]),
        valid=torch.tensor([[value is not None for value in row] for row in values]),
        lengths=torch.tensor([score.length for score in scores], dtype=torch.float32),
        reference_lengths=torch.tensor([score.reference_length for score in scores], dtype=torch.float32),
        group_ids=torch.repeat_interleave(
            torch.arange(len(groups)), torch.tensor([len(group) for group in groups], dtype=torch.int64)
        ),
    )
