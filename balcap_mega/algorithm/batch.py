"""What the algorithm reads: rewards of a whole global batch, and the tokens one microbatch trains on."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RewardBatch:
    """Reward components of the N rollouts of one step, over all data-parallel ranks.

    names:             the K component names, e.g. ("precision", "recall", "linguistic")
    values:            [K, N] float32 in [0, 1]; what stands at a missing entry is never read
    valid:             [K, N] bool, False where the judge failed (missing, which is not 0)
    lengths:           [N] float32, caption lengths in the gate's unit (words or tokens)
    reference_lengths: [N] float32, the same of each rollout's reference
    group_ids:         [N] int64 in [0, P), rollouts of one prompt share one id; groups may have any size
    """

    names: tuple[str, ...]
    values: Tensor
    valid: Tensor
    lengths: Tensor
    reference_lengths: Tensor
    group_ids: Tensor


@dataclass(frozen=True)
class Advantages:
    """values: [N] float32; per_component: [K, N] float32, before weighting; gated: [N] bool, linguistic set to 0."""

    values: Tensor
    per_component: Tensor
    gated: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The R response tokens of one microbatch, sequence after sequence; all [R].

    targets:           int64 vocabulary ids
    sequence_ids:      int64 in [0, N): which rollout of the global batch a token belongs to, non-decreasing runs
    advantages:        float32, the sequence's advantage at each of its tokens
    old_logprobs:      float32 under the policy at the start of the step; None on the first update after it, where they
                       are the current ones (detached), so that the ratio is exactly 1 and no extra forward is spent
    rollout_logprobs:  float32 as the engine reported them while sampling
    reference_logprobs: float32 under the frozen reference policy, or None when no KL is asked for
    sequence_lengths:  float32, the number of response tokens of the sequence a token belongs to
    """

    targets: Tensor
    sequence_ids: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor
    reference_logprobs: Tensor | None
    sequence_lengths: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{name: None if column is None else column.to(device) for name, column in columns.items()})
