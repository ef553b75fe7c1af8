"""Sampling, what is kept of a step's captions, and which steps are profiled."""

from typing import Annotated, Literal

from pydantic import Field

from balcap_mega.config.schema.base import MAY_CHANGE, Positive, Section


class RolloutConfig(Section):
    """vLLM: prompts a step, captions a prompt, and how they are sampled."""

    prompts_per_step: Positive = 64
    """Images a step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Captions sampled for each image (G)."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """Steps that captions are sampled ahead. 1: those of the next step before this step's update, so that the judge has
    a whole step for them. They are one update old then, which algorithm.importance corrects. A run that is prolonged
    begins its new steps as a first step: with captions of its own."""
    max_tokens: Positive = 512
    """Longest caption."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling and of the trainer's logprobs alike."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus to sample from. Below 1 the trainer still differentiates the whole distribution: that bias is not
    corrected, and neither ratio nor mismatch shows it; a run says so as it begins."""
    tensor_parallel: Annotated[Positive, MAY_CHANGE] = 1
    """Consecutive ranks that share one engine."""
    max_model_len: Positive = 4096
    """Longest image, prompt and caption together, in tokens."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1), MAY_CHANGE] = 0.6
    """Share of a GPU's memory for the engine, weights and cache together. The learner's weights stay beside it."""
    fp8: bool = False
    """Quantise the engine's decoder; needs a GPU and algorithm.importance_cap."""
    verify_refit_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 50
    """Compare checksums of all weights in every n-th refit; 0: never."""
    timeout_seconds: Annotated[Positive, MAY_CHANGE] = 600
    """Longest wait for a step's captions, and for another rank in a refit."""


class RecordConfig(Section):
    """What stays on disk of every step's captions and verdicts: one file a step in output_dir/rollouts."""

    keep: Literal["all", "extremes", "none"] = "all"
    """Captions of each image: all, the best and the worst one, or nothing. launch/replay.py needs all."""
    max_gib: Annotated[float, Field(gt=0)] = 10.0
    """Disk space for them; the oldest steps make room for new ones."""


class ProfileConfig(Section):
    """PyTorch's profiler."""

    steps: tuple[Positive, ...] = ()
    """Steps to profile, from 1, such as [5,6]: each rank leaves a trace of them, on a GPU a memory snapshot too, in
    output_dir/profile."""
