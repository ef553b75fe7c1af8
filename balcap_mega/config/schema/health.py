"""What stops a run that has gone wrong."""

from typing import Literal

from pydantic import field_validator

from balcap_mega.config.schema.base import NonNegative, Positive, Section


class UpdateCheck(Section):
    """What an update may not be past, and whether it is applied all the same (warn), left out (skip), or the last."""

    policy: Literal["stop", "skip", "warn"]
    """warn: apply the update all the same. skip: leave it out. stop: end the run before it."""
    bound: NonNegative
    """What the value may not exceed."""


class TrendCheck(Section):
    """What a metric may not be past in `steps` steps in a row, and whether the run then stops or only says so."""

    policy: Literal["stop", "warn"]
    """What happens after `steps` such steps."""
    bound: NonNegative
    """What the metric may not be past."""
    steps: Positive
    """Steps in a row."""


class HealthConfig(Section):
    """What is wrong with a run, and what then happens; `balcap_mega.training.guard.health` says what each is about."""

    non_finite: Literal["stop", "skip"] = "stop"
    """Loss, gradients or logprobs. skip: leave the update out, it moves neither weights nor optimizer."""
    mismatch: UpdateCheck = UpdateCheck(policy="stop", bound=0.2)
    """Nats by which trainer and engine differ in a token's logprob, on average."""
    skipped: TrendCheck = TrendCheck(policy="stop", bound=0.0, steps=10)
    """Share of a step's updates that were left out."""
    constant_reward: TrendCheck = TrendCheck(policy="warn", bound=1e-6, steps=20)
    """Standard deviation of a reward over the step's captions."""
    missing_reward: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    """Share of captions without a reward; one step past rewards.max_missing_fraction is the last."""
    truncated: TrendCheck = TrendCheck(policy="warn", bound=0.5, steps=20)
    """Share of captions that were cut at rollout.max_tokens."""
    low_entropy: TrendCheck = TrendCheck(policy="warn", bound=0.01, steps=20)
    """Nats a token."""
    short_captions: TrendCheck = TrendCheck(policy="warn", bound=0.1, steps=20)
    """Caption length over reference length."""
    long_captions: TrendCheck = TrendCheck(policy="warn", bound=5.0, steps=20)
    """Caption length over reference length."""

    @field_validator("*", mode="before")
    @classmethod
    def on_top_of_the_default(cls, value, field):
        """So that a file may give a check's policy alone."""
        default = cls.model_fields[field.field_name].default
        return {**default.model_dump(), **value} if isinstance(value, dict) and isinstance(default, Section) else value
