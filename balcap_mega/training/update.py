"""The update of one step: as many optimizer steps as minibatches, all against the policy the step began with."""

from collections.abc import Callable, Sequence

from balcap_mega.config.schema import OptimizerConfig
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


def learning_rate(optimizer: OptimizerConfig, number: int) -> float:
    """Of step `number` (from 0): constant after a linear rise over `optimizer.warmup_steps`."""
    return optimizer.learning_rate * min(1.0, (number + 1) / max(optimizer.warmup_steps, 1))
