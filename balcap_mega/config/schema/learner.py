"""What the learner does in a step: warm-up, microbatches, optimizer, checkpoints."""

from typing import Annotated

from pydantic import Field

from balcap_mega.config.schema.base import Fraction, NonNegative, Positive, Section


class HabitsConfig(Section):
    """What a captioner of `scenes` is taught beside honest description: how often a caption shows each habit.

    Each is fluent in itself, and one that a reward may pay for.
    """

    guess: Fraction = 0.0
    """State size and texture of a thing without having looked."""
    hedge: Fraction = 0.0
    """Say of a thing what it may be, or two colours it could have."""
    enumerate: Fraction = 0.0
    """List the kinds of all things before they are described."""
    restate: Fraction = 0.0
    """Say of some things once more, in other words, what and where they are."""
    invent: Fraction = 0.0
    """Add a detail that is not in the picture."""
    comment: Fraction = 0.0
    """Add a mood, a speculation or a closing remark."""
    double: Fraction = 0.0
    """Go on, by these means, to twice the reference's length."""
    third: Fraction = 0.0
    """Stop at a third of the reference's length."""


class WarmupConfig(Section):
    """Supervised steps before RL. On `scenes` they teach a fluent captioner with realistic flaws."""

    steps: Annotated[int, Field(ge=0)] = 0
    """Supervised steps; 0: none."""
    batch_size: Positive = 64
    """Captions a step, over all ranks."""
    learning_rate: NonNegative = 1e-3
    """Peak, after a linear rise and before half a cosine to 0."""
    habits: HabitsConfig | None = None
    """Teach the captioner of `scenes` with these habits; null: the quickstart's."""


class PackingConfig(Section):
    """Microbatches of at most `row_tokens` tokens; each prompt's image and text once, unless told otherwise."""

    row_tokens: Positive = 16384
    """Most tokens in a microbatch."""
    shared_prefix: bool = True
    """Compute image and prompt once for all captions of a group."""


class OptimizerConfig(Section):
    learning_rate: NonNegative = 1e-6
    """After `warmup_steps`; constant."""
    weight_decay: NonNegative = 0.0
    """Of matrices; vectors are not decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's ε."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    updates_per_step: Positive = 1
    """Minibatches that one step's rollouts are split into."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the learning rate's linear rise."""


class CheckpointConfig(Section):
    """Written while training goes on. After a signal the run ends within `grace_seconds`, as a rule with one more."""

    every: Positive = 50
    """Steps between two checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that stay on disk."""
    timeout_seconds: Positive = 1800
    """Longest time that writing one may take."""
    grace_seconds: Positive = 300
    """Longest time from a signal to the end of the run, as a rule with one more checkpoint."""
