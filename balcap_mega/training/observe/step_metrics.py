"""What a step reports: one flat dictionary of numbers, named as the console and metrics.jsonl show them."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from balcap_mega.algorithm.batch import Advantages, RewardBatch
from balcap_mega.algorithm.length_gate import length_ratios
from balcap_mega.packing.assign import RowAssignment
from balcap_mega.rewards.balance import balance
from balcap_mega.rollout.rollouts import RolloutGroup
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.off_policy import OffPolicy

TOKEN_MEANS = (
    "clip_fraction",
    "dual_clip_fraction",
    "kl_reference",
    "kl_old",
    "importance_weight",
    "importance_truncated",
)


def step_metrics(
    groups: Sequence[RolloutGroup],
    rewards: RewardBatch,
    advantages: Advantages,
    packed: Sequence[RowAssignment],
    updates: Sequence[UpdateResult],
    seconds: Mapping[str, float],
    off_policy: OffPolicy | None = None,
) -> dict[str, float]:
    """Rewards over the step's rollouts, its updates, sizes, and seconds by phase.

    What an update reports as a mean over its tokens is here one over the tokens of all updates, and a maximum is that
    of all of them; loss and gradient norm are means over updates. Those that were left out count only for what they
    say of trainer, engine and entropy. NaN where every update was left out.

    packed:     how each update's captions were shared out over rows
    off_policy: of captions that were sampled ahead. Others come from the weights that the first update begins with:
        then the updates say how trainer and engine differ, and nothing is stale.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    response_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    total = sum(seconds.values())
    row_tokens = sum(each.tokens for each in packed)
    applied = [update for update in updates if update.applied]

    def mean(value: Callable[[UpdateResult], float]) -> float:
        return fmean(map(value, applied)) if applied else math.nan

    def mean_over_tokens(name: str, of: Sequence[UpdateResult] = applied) -> float:
        tokens = [update.metrics["tokens"] for update in of]
        return fmean([update.metrics[name] for update in of], tokens) if sum(tokens) else math.nan

    def maximum(name: str) -> float:
        return max((update.metrics[name] for update in updates), key=lambda value: (math.isnan(value), value))

    differences = OffPolicy(
        mean_over_tokens("engine_logprob_difference", updates), maximum("engine_logprob_difference_max"), 0.0, 0.0
    )
    differences = differences if off_policy is None else off_policy
    return {
        **reward_metrics(rewards, advantages),
        "rollout/truncated": fmean(not rollout.finished for rollout in rollouts),
        "rollout/response_tokens": response_tokens / len(rollouts),
        "rollout/logprob_difference_max": differences.mismatch_max,
        "rollout/logprob_difference": differences.mismatch,
        "rollout/staleness_max": differences.staleness_max,
        "rollout/staleness": differences.staleness,
        "policy/updates_skipped": 1 - len(applied) / len(updates),
        "policy/loss": mean(lambda update: update.loss),
        "policy/gradient_norm": mean(lambda update: update.gradient_norm),
        **{f"policy/{name}": mean_over_tokens(name) for name in TOKEN_MEANS},
        "policy/entropy": mean_over_tokens("entropy", updates),
        "policy/ratio_max": maximum("ratio_max"),
        "policy/ratio_max_first": updates[0].metrics["ratio_max"],
        "packing/tokens": row_tokens,
        "packing/padding_share": sum(each.padding for each in packed) / row_tokens,
        "packing/tokens_saved": sum(each.unshared_tokens for each in packed) / row_tokens,
        "packing/imbalance": max(each.imbalance for each in packed),
        "throughput/response_tokens_per_second": response_tokens / total,
        "throughput/samples_per_second": len(rollouts) / total,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "seconds/step": total,
    }


def reward_metrics(rewards: RewardBatch, advantages: Advantages) -> dict[str, float]:
    """Mean and deviation over the rollouts that have a component, as judged (before the length gate), on 0-1.

    The mean is NaN where none has it.
    """
    means, metrics = {}, {}
    for name, values, valid in zip(rewards.names, rewards.values, rewards.valid, strict=True):
        means[name] = metrics[f"reward/{name}"] = values[valid].mean().item() if valid.any() else math.nan
        metrics[f"reward/{name}_std"] = values[valid].std().item() if valid.sum() > 1 else 0.0
        metrics[f"reward/{name}_missing"] = 1 - valid.float().mean().item()
    return {
        **metrics,
        **{f"reward/{key}": value for key, value in balance(means).items()},
        "reward/gate_rate": advantages.gated.float().mean().item(),
        "reward/length_ratio": length_ratios(rewards).mean().item(),
        "advantage/zero_share": (advantages.values == 0).float().mean().item(),
        "advantage/std": advantages.values.std().item(),
    }
