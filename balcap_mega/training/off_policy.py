"""How far captions are from the policy they train, in two parts: the engine, and weights that are an update old.

Captions that were sampled a step ahead come from the engine, under weights from before the last update. The loss
corrects for both at once (`algorithm.importance`). A fault shows in one of them alone: trainer and engine must agree
at equal weights, however large the updates are. So the trainer scores some captions right after they were sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import torch
import torch.distributed
from megatron.core import parallel_state
from torch import Tensor

from balcap_mega.training.microbatch import Microbatch

SHARE = 8
"""One prompt in so many is scored: a forward pass over an eighth of a step's captions, twice."""

ByCaption = tuple[tuple[float, ...], ...]
"""Logprobs of the tokens of some captions, one after the other."""


@dataclass(frozen=True)
class OffPolicy:
    """Absolute differences of a token's logprob, mean and maximum, over the captions of one prompt in `SHARE`.

    mismatch:  engine and trainer, under the weights that sampled
    staleness: the trainer, under the weights that sampled and under those that the update begins with
    by_caption: the mean staleness of each of these captions, which are a step's first
    """

    mismatch: float
    mismatch_max: float
    staleness: float
    staleness_max: float
    by_caption: tuple[float, ...] = ()

    @classmethod
    def of(cls, engine: ByCaption, sampling: ByCaption, now: ByCaption) -> "OffPolicy":
        """Over the captions that all three have: a run that goes on under another layout may score more or fewer."""
        shared = min(map(len, (engine, sampling, now)))
        mismatch = _differences(engine[:shared], sampling[:shared])
        staleness = _differences(sampling[:shared], now[:shared])
        return cls(
            fmean(chain(*mismatch)), max(chain(*mismatch)), fmean(chain(*staleness)), max(chain(*staleness)),
            tuple(map(fmean, staleness)),
        )  # fmt: skip


def scored_prompts(prompts: int, data_size: int) -> int:
    """How many of a step's prompts are scored, its first; at least one for each data-parallel rank."""
    return max(prompts // SHARE, data_size)


def by_caption(microbatches: Sequence[Microbatch], logprobs: Sequence[Tensor], captions: int) -> ByCaption:
    """Every rank's logprobs of its microbatches (`Learner.logprobs`), by the caption's number. A collective."""
    mine: list[tuple[int, int, float]] = []
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for microbatch, values in zip(microbatches, logprobs, strict=True):
            row = microbatch.row
            mine += zip(row.sequence_ids.tolist(), row.token_index.tolist(), values.tolist(), strict=True)
    shares: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, mine)
    found: list[list[float]] = [[] for _ in range(captions)]
    for sequence, _, value in sorted(token for share in shares for token in share):
        found[sequence].append(value)
    return tuple(map(tuple, found))


def _differences(one: ByCaption, other: ByCaption) -> list[list[float]]:
    """Of each caption's tokens."""
    pairs = zip(one, other, strict=True)
    return [[abs(a - b) for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs]
