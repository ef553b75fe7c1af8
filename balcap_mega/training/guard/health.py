"""Checks the numbers of updates and steps against the bounds of `HealthConfig`.

`Health.accepts` checks an update before it is applied, `Health.observe` a finished step and those before it. Their
numbers are the same on all ranks, so all ranks decide alike.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from balcap_mega.config.schema import HealthConfig, TrendCheck
from balcap_mega.errors import UserError
from balcap_mega.training.learner import UpdateResult


@dataclass(frozen=True)
class Finding:
    """A check that failed.

    check:  the key below `health` that sets bound and policy
    step:   counted from 1, as in metrics.jsonl
    value:  the number that is past `bound`
    sound:  whether the weights are good nevertheless, so that a checkpoint of them is worth keeping
    """

    check: str
    step: int
    value: float
    bound: float
    policy: Literal["stop", "skip", "warn"]
    problem: str
    remedy: str
    sound: bool = False

    def __str__(self) -> str:
        return f"health.{self.check}: {self.problem}"


class Unhealthy(UserError):
    """A check with the policy "stop" failed. It ends the run."""

    def __init__(self, finding: Finding):
        super().__init__(f"step {finding.step}, {finding}", remedy=finding.remedy)


@dataclass(frozen=True)
class Trend:
    """A check that fails once a metric is past its bound in `check.steps` steps in a row.

    past:    past(value, bound) says whether a value is
    meaning: of such a value, for the message
    """

    name: str
    metric: str
    past: Callable[[float, float], bool]
    check: TrendCheck
    meaning: str
    remedy: str
    sound: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} {self.metric}"


class Health:
    """The checks of one run and their state.

    streaks: by a trend's `key`, for how many steps in a row its metric has been past its bound. `replay` restores them
        from metrics.jsonl, so that a resumed run warns and stops as one without the interruption.
    """

    def __init__(self, config: HealthConfig, weights: Mapping[str, float]):
        """weights: of the reward components by name; only those of positive weight are checked."""
        self.config = config
        self.trends = _trends(config, [name for name, weight in weights.items() if weight > 0])
        self.streaks: dict[str, int] = {}
        self._of_this_step: list[Finding] = []

    def accepts(self, step: int, result: UpdateResult, mismatch: float | None = None) -> bool:
        """Whether to apply an update of `step`, by the policy of its checks. Raises Unhealthy where that is "stop".

        mismatch: mean difference of the engine's and the trainer's logprobs at equal weights. Pass it where the
                  update's captions come from older weights, so that `result` holds no such number.
        """
        finding = _wrong_with(step, result, self.config, mismatch)
        if finding is None:
            return True
        if finding.policy == "stop":
            raise Unhealthy(finding)
        self._of_this_step.append(finding)
        return finding.policy == "warn"

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Findings of a finished step: those of `accepts`, and each trend whose streak is a multiple of its `steps`."""
        self._count(metrics)
        findings, self._of_this_step = self._of_this_step, []
        for trend in self.trends:
            streak, steps = self.streaks[trend.key], trend.check.steps
            value, bound = metrics.get(trend.metric, math.nan), trend.check.bound
            if trend.past(value, bound) and streak % steps == 0:
                problem = f"{trend.metric} is {value:.3g}, for {streak} steps past {bound:g}: {trend.meaning}"
                policy = trend.check.policy
                findings.append(Finding(trend.name, step, value, bound, policy, problem, trend.remedy, trend.sound))
        return findings

    def replay(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Restore `streaks` from rows of metrics.jsonl."""
        for row in rows:
            self._count(row)

    def _count(self, metrics: Mapping[str, float]) -> None:
        for trend in self.trends:
            value, streak = metrics.get(trend.metric, math.nan), self.streaks.get(trend.key, 0)
            if not math.isnan(value):  # which an update that was left out says nothing about
                streak = streak + 1 if trend.past(value, trend.check.bound) else 0
            self.streaks[trend.key] = streak


def _wrong_with(step: int, result: UpdateResult, config: HealthConfig, mismatch: float | None) -> Finding | None:
    difference = result.metrics["engine_logprob_difference"]
    if not result.finite:
        problem = (
            f"loss {result.loss}, gradient norm {result.gradient_norm}, difference of logprobs {difference}: not finite"
        )
        remedy = "the weights were left as they were and the last checkpoint is good; look at the steps before this one"
        return Finding("non_finite", step, result.loss, math.inf, config.non_finite, problem, remedy)
    difference = difference if mismatch is None else mismatch
    if difference > config.mismatch.bound:
        problem = (
            f"trainer and engine differ by {difference:.3g} in a token's logprob, past {config.mismatch.bound:g}: they "
            "do not have the same weights, or do not compute the same"
        )
        remedy = "check each refit (rollout.verify_refit_every=1), and the model by launch/check_model.py"
        return Finding("mismatch", step, difference, config.mismatch.bound, config.mismatch.policy, problem, remedy)
    return None


def _trends(config: HealthConfig, components: Iterable[str]) -> list[Trend]:
    judge = "look at the judge's replies for some captions; in a new run without this reward, set its weight to 0"
    learning = "start a new run with a lower optimizer.learning_rate"
    rewards = [
        trend
        for name in components
        for trend in (
            Trend("constant_reward", f"reward/{name}_std", operator.le, config.constant_reward,
                  "all captions get the same reward, which teaches nothing", judge, sound=True),
            Trend("missing_reward", f"reward/{name}_missing", operator.gt, config.missing_reward,
                  "the share of captions without this reward", judge, sound=True),
        )
    ]  # fmt: skip
    return [
        *rewards,
        Trend("skipped", "policy/updates_skipped", operator.gt, config.skipped, "the share of updates left out",
              "go back to the last checkpoint and look at what made the first of them fail", sound=False),
        Trend("truncated", "rollout/truncated", operator.gt, config.truncated,
              "the share of captions cut at the token limit, whose ends nobody has judged",
              "in a new run raise rollout.max_tokens or set algorithm.truncated=mask", sound=True),
        Trend("low_entropy", "policy/entropy", operator.lt, config.low_entropy,
              "the policy says the same whatever is drawn", f"{learning}, or with algorithm.entropy_weight"),
        Trend("short_captions", "reward/length_ratio", operator.lt, config.short_captions,
              "captions shrink to nothing beside their references", f"{learning}, or algorithm.length_control=gate"),
        Trend("long_captions", "reward/length_ratio", operator.gt, config.long_captions,
              "captions outgrow their references", f"{learning}, or algorithm.length_control=gate"),
    ]  # fmt: skip
