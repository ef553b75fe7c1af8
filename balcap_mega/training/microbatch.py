"""One microbatch of the policy: a packed row, its images, and what the loss reads at each response token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.models.vision import VisionInputs
from balcap_mega.packing.rows import PackedRow


@dataclass(frozen=True)
class Microbatch:
    """`tokens` has one entry for each of the row's R response tokens, in the row's order."""

    row: PackedRow
    images: tuple[VisionInputs, ...]
    tokens: TokenBatch


@dataclass(frozen=True)
class SequenceValues:
    """What the loss needs of the step's N rollouts.

    advantages:       [N] float32
    rollout_logprobs: for each rollout, the engine's logprob of each of its response tokens
    """

    advantages: Tensor
    rollout_logprobs: Sequence[Sequence[float]]

    def of_row(self, row: PackedRow) -> TokenBatch:
        """These values at each response token of `row`."""
        sequences, places = row.sequence_ids.tolist(), row.token_index.tolist()
        return TokenBatch(
            targets=row.targets,
            sequence_ids=row.sequence_ids,
            token_index=row.token_index,
            advantages=self.advantages,
            old_logprobs=None,
            rollout_logprobs=torch.tensor([self.rollout_logprobs[n][t] for n, t in zip(sequences, places)]),
            reference_logprobs=None,
            sequence_lengths=torch.tensor([float(len(self.rollout_logprobs[n])) for n in sequences]),
        )


def with_old_logprobs(microbatches: Sequence[Microbatch], logprobs: Sequence[Tensor]) -> list[Microbatch]:
    """The microbatches with the logprobs, [R] each, that the policy gave them before the step's first update."""
    return [
        replace(microbatch, tokens=replace(microbatch.tokens, old_logprobs=old))
        for microbatch, old in zip(microbatches, logprobs, strict=True)
    ]


def with_reference_logprobs(microbatches: Sequence[Microbatch], logprobs: Sequence[Tensor]) -> list[Microbatch]:
    """The microbatches with the logprobs, [R] each, that the frozen reference policy gives them."""
    return [
        replace(microbatch, tokens=replace(microbatch.tokens, reference_logprobs=reference))
        for microbatch, reference in zip(microbatches, logprobs, strict=True)
    ]
