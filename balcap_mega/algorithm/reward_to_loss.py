"""From the rewards of a whole step to its loss: what two launches do on a GPU."""

from dataclasses import replace

from torch import Tensor

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.algorithm.batch import Advantages, RewardBatch, TokenBatch
from balcap_mega.algorithm.dispatch import use_kernels
from balcap_mega.algorithm.policy_loss import PolicyLoss, kernel_policy_loss, policy_loss
from balcap_mega.config.schema import AlgorithmConfig


def reward_to_loss(
    rewards: RewardBatch,
    logprobs: Tensor,
    tokens: TokenBatch,
    config: AlgorithmConfig,
    *,
    entropy: Tensor | None = None,
    max_response_length: int | None = None,
) -> tuple[PolicyLoss, Advantages]:
    """`compute_advantages`, each token given its sequence's, then `policy_loss`; `tokens.advantages` is not read.

    `tokens.sequence_ids` index the N rollouts of `rewards`. For a step that is trained on in one microbatch.
    """
    advantages = compute_advantages(rewards, config)
    if use_kernels(logprobs) and config.ratio_level == "token":
        return kernel_policy_loss(logprobs, tokens, config, entropy, max_response_length, advantages.values), advantages
    tokens = replace(tokens, advantages=advantages.values[tokens.sequence_ids])
    return policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=max_response_length), advantages
