"""What a policy update reports about itself, in a form that adds up over chunks, microbatches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Summed over tokens; all but the first are reported as means over tokens.
SUMS = (
    "tokens",
    "clip_fraction",  # the clip is active: outside the range, on the side where it removes the gradient
    "dual_clip_fraction",
    "kl_reference",  # k3 estimate of KL(policy ‖ reference)
    "kl_old",  # k3 estimate of KL(old policy ‖ policy)
    "importance_weight",  # `policy_loss.importance_weights`
    "importance_truncated",  # where the weight was cut, or the token left out
    "engine_logprob_difference",  # |old − rollout|, the trainer's and the engine's view of the same tokens
    "entropy",
)
MAXIMA = ("ratio_max", "engine_logprob_difference_max")


@dataclass(frozen=True)
class PolicyMetrics:
    """sums: [len(SUMS)] float32; maxima: [len(MAXIMA)] float32, all of them at least 0."""

    sums: Tensor
    maxima: Tensor

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> "PolicyMetrics":
        return cls(torch.zeros(len(SUMS), device=device), torch.zeros(len(MAXIMA), device=device))

    def __add__(self, other: "PolicyMetrics") -> "PolicyMetrics":
        return PolicyMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def all_reduced(self, group: torch.distributed.ProcessGroup | None = None) -> "PolicyMetrics":
        """The metrics over all data-parallel ranks of `group`."""
        sums, maxima = self.sums.clone(), self.maxima.clone()
        torch.distributed.all_reduce(sums, group=group)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX, group=group)
        return PolicyMetrics(sums, maxima)

    def summary(self) -> dict[str, float]:
        """Means over tokens and the maxima, by name; `tokens` is the count itself. Waits for the device once."""
        tokens, *sums = self.sums.tolist()
        means = {name: value / max(tokens, 1.0) for name, value in zip(SUMS[1:], sums)}
        return {"tokens": tokens, **means, **dict(zip(MAXIMA, self.maxima.tolist()))}
