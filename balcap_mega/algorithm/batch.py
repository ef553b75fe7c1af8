"""What the algorithm reads: rewards of a whole global batch, and the tokens one microbatch trains on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from balcap_mega.parallel.transfer import to_device


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

    def to(self, device: torch.device) -> "RewardBatch":
        return RewardBatch(**{name: _moved(column, device) for name, column in vars(self).items()})


@dataclass(frozen=True)
class Advantages:
    """values: [N] float32; per_component: [K, N] float32, before weighting; gated: [N] bool, a reward
    was set to 0 for its length."""

    values: Tensor
    per_component: Tensor
    gated: Tensor


@dataclass(frozen=True)
class TokenBatch:
    """The R response tokens of one microbatch, sequence after sequence; all [R] but the advantages.

    targets:           int64 vocabulary ids
    sequence_ids:      int64 in [0, N): which rollout of the global batch a token belongs to, non-decreasing runs
    token_index:       int64, the token's place in its sequence
    advantages:        [N] float32, of the rollouts of the global batch; the loss looks them up by `sequence_ids`
    old_logprobs:      float32 under the policy at the start of the step; None on the first update after it, where they
                       are the current ones (detached), so that the ratio is exactly 1 and no extra forward is spent
    rollout_logprobs:  float32 as the engine reported them while sampling
    reference_logprobs: float32 under the frozen reference policy, or None when no KL is asked for
    sequence_lengths:  float32, the number of response tokens of the sequence a token belongs to
    """

    targets: Tensor
    sequence_ids: Tensor
    token_index: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor
    reference_logprobs: Tensor | None
    sequence_lengths: Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(**{name: _moved(column, device) for name, column in vars(self).items()})

    def __getitem__(self, rows: slice) -> "TokenBatch":
        """Some of the tokens, as views."""
        columns = {name: column if column is None else column[rows] for name, column in vars(self).items()}
        return TokenBatch(**columns | {"advantages": self.advantages})


def _moved(column: Any, device: torch.device) -> Any:
    return to_device(column, device) if isinstance(column, Tensor) else column
