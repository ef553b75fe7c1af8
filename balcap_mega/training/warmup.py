"""Supervised warm-up: imitate captions before reinforcement learning improves on them.

It is a stage of its own, from one Hugging Face folder to another: reinforcement learning starts from its output as it
would from any checkpoint, and a warm-up that was interrupted starts again.
"""

import math
from collections.abc import Callable

from balcap_mega.config.schema import WarmupConfig
from balcap_mega.data.records import CaptionDataset, CaptionRecord
from balcap_mega.data.sampler import RecordSampler
from balcap_mega.training.batches import BatchBuilder
from balcap_mega.training.learner import Learner, UpdateResult

RAMP = 0.05  # share of the steps over which the learning rate rises


def learning_rate(step: int, config: WarmupConfig) -> float:
    """A linear rise, then half a cosine down to zero."""
    ramp = max(RAMP * config.steps, 1.0)
    if step < ramp:
        return config.learning_rate * (step + 1) / ramp
    progress = (step - ramp) / max(config.steps - ramp, 1.0)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def warm_up(
    learner: Learner,
    batches: BatchBuilder,
    dataset: CaptionDataset,
    target: Callable[[CaptionRecord, int], str],
    config: WarmupConfig,
    *,
    seed: int,
    on_step: Callable[[int, UpdateResult], None],
) -> None:
    """Train `learner` for `config.steps` steps; `on_step(step, result)` is called after each.

    `target(record, step)` is the caption to imitate, which need not be the reference.
    """
    sampler, grid = RecordSampler(len(dataset), seed, config.batch_size), batches.grid
    for step in range(config.steps):
        records = [dataset[index] for index in sampler.shard(step, grid.data_rank, grid.data_size)]
        microbatches = batches.supervised(records, [target(record, step) for record in records])
        on_step(step, learner.supervised_update(microbatches, learning_rate(step, config)))
