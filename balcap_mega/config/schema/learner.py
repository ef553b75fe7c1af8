"""What the learner does in a step: warm-up, microbatches, optimizer, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from balcap_mega.config.schema.base import Fraction, NonNegative, Positive, Section

BFLOAT16_STALLS = 2.0**-8
"""Under a relative change no larger than this a bfloat16 may stay what it is: half its widest step."""


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
    main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are added up over microbatches, and over data-parallel ranks."""
    precision_aware: bool = False
    """Keep of each float32 master weight only what its bfloat16 weight lacks, 16 bits: the same weights in 2 bytes a
    parameter less, and moments of the dtypes below. Needs a GPU, Transformer Engine and the distributed optimizer."""
    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's first moment; bfloat16 needs precision_aware=true."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of AdamW's second moment; bfloat16 needs precision_aware=true."""
    updates_per_step: Positive = 1
    """Minibatches that one step's rollouts are split into."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the learning rate's linear rise."""

    @model_validator(mode="after")
    def moments_can_be_kept(self):
        for key, beta in zip(("exp_avg_dtype", "exp_avg_sq_dtype"), self.betas):
            if getattr(self, key) == "float32":
                continue
            if not self.precision_aware:
                raise ValueError(f"{key}=bfloat16 needs precision_aware=true; set optimizer.precision_aware=true")
            if 1 - beta <= BFLOAT16_STALLS:
                raise ValueError(
                    f"{key}=bfloat16 is too coarse for betas={list(self.betas)}: rounding swallows a decay of "
                    f"{1 - beta:.3g} a step; set optimizer.{key}=float32, or that beta to at most 0.996"
                )
        return self


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
