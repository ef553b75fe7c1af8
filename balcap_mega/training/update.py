"""The update of one step: as many optimizer steps as minibatches, all against the policy the step began with."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from megatron.core import parallel_state
from torch import Tensor

from balcap_mega.config.schema import OptimizerConfig
from balcap_mega.parallel.transfer import to_device
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.microbatch import Microbatch, with_old_logprobs, with_reference_logprobs


def update_policy(
    learner: Learner, minibatches: Sequence[Sequence[Microbatch]], accept: Callable[[UpdateResult], bool]
) -> list[UpdateResult]:
    """One optimizer step a minibatch, the ratio and the KL always against the policy the step began with."""
    if learner.algorithm.kl_weight > 0:
        minibatches = list(map(with_reference_logprobs, minibatches, learner.reference_logprobs(minibatches)))
    # The first update needs no old logprobs: they are its own. Later ones need them from before the first.
    minibatches = [
        *minibatches[:1],
        *(with_old_logprobs(minibatch, learner.logprobs(minibatch)) for minibatch in minibatches[1:]),
    ]
    return [learner.update(minibatch, accept) for minibatch in minibatches]


def caption_logprobs(
    minibatches: Sequence[Sequence[Microbatch]], updates: Sequence[UpdateResult], captions: int, device: torch.device
) -> Tensor:
    """Each caption's mean over its tokens of `UpdateResult.old_logprobs`, over all ranks; [captions] float64.

    captions: how many the minibatches hold over all ranks, by `sequence_ids`
    A collective, of two numbers a caption, for which the host does not wait. No forward pass is spent on it.
    """
    sums = torch.zeros(2, captions, dtype=torch.float64, device=device)
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        logprobs = chain.from_iterable(update.old_logprobs for update in updates)
        for microbatch, values in zip(chain.from_iterable(minibatches), logprobs, strict=True):
            pairs = torch.stack([values, torch.ones_like(values)]).double()
            sums.index_add_(1, to_device(microbatch.tokens.sequence_ids, device), pairs)
    torch.distributed.all_reduce(sums)
    return sums[0] / sums[1]


def learning_rate(optimizer: OptimizerConfig, number: int) -> float:
    """Of step `number` (from 0): constant after a linear rise over `optimizer.warmup_steps`."""
    return optimizer.learning_rate * min(1.0, (number + 1) / max(optimizer.warmup_steps, 1))
