"""The update of a recorded step once more, from its checkpoint, without engine and judge, under this or another layout.

What can be replayed: a step whose captions are all on record (`rollouts.keep: all`) and at whose beginning there is a
checkpoint: the first step, and each that follows a checkpoint still in the folder (`checkpoint.every`, `.keep`).
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from balcap_mega.algorithm.advantages import component_weights, compute_advantages
from balcap_mega.algorithm.batch import Advantages, RewardBatch
from balcap_mega.config.load import load_config
from balcap_mega.config.preflight import check_device
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.sources import build_datasets
from balcap_mega.errors import UserError
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.training.batches import batch_builder
from balcap_mega.training.build import build_learner
from balcap_mega.training.checkpoint.format import load_checkpoint
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.guard.health import Health, Unhealthy
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.observe.metrics import read_metrics
from balcap_mega.training.observe.step_metrics import step_metrics
from balcap_mega.training.prompt_fit import fitting
from balcap_mega.training.prompts import Prompts
from balcap_mega.training.record.format import RecordedStep, ranges, read_step, steps_on_record
from balcap_mega.training.truncation import without_truncated
from balcap_mega.training.update import learning_rate, update_policy

COMPARED = ("policy/", "rollout/", "reward/", "advantage/", "packing/")
OFF_POLICY = ("rollout/logprob_difference", "rollout/staleness")


@dataclass(frozen=True)
class Replayed:
    """recorded: the row of metrics.jsonl, empty where the step was not finished; metrics: of the replay
    updates: the replay's, one by one, without the tokens' logprobs
    """

    recorded: Mapping[str, float]
    metrics: Mapping[str, float]
    updates: Sequence[UpdateResult]

    @property
    def compared(self) -> list[str]:
        """Names that stand on both sides, or in the replay where nothing is recorded."""
        return [
            name for name in self.metrics if name.startswith(COMPARED) and (name in self.recorded or not self.recorded)
        ]


def replay(root: Path, step: int, overrides: Sequence[str] = ()) -> Replayed:
    """Run the update of `step` (counted from 1, as in metrics.jsonl); nothing in the folder changes. A collective.

    overrides: `key=value` on top of the run's configuration, such as another layout. Advantages are the recorded ones,
        unless a key of `algorithm` differs from the run's: then they follow from the recorded rewards.

    Raises UserError for a step that cannot be replayed, naming those that can, and for data that has changed.
    """
    folder = RunFolder(root)
    own, config = load_config(folder.config), load_config(folder.config, overrides)
    if config.algorithm.gate.unit != own.algorithm.gate.unit:
        raise UserError(
            f"algorithm.gate.unit={config.algorithm.gate.unit}, but lengths are on record in {own.algorithm.gate.unit}",
            remedy="leave it as it was",
        )
    checkpoint = replayable(folder, step)
    recorded = read_step(folder.rollouts, step)
    check_device(config)
    platform = Platform.resolve(config.parallel.device)
    grid = initialize_parallel(config.parallel, platform, config.seed)
    start = starting_folder(config, folder)
    datasets = build_datasets(config.data, config.seed)
    if config.model.path is not None:  # records that were left out are numbered out
        datasets = fitting(config, datasets, platform.device)
    learner = build_learner(config, start, platform)
    if checkpoint is not None:
        load_checkpoint(checkpoint, learner.model, learner.optimizer)
    groups = [group.as_rollouts(f"the record of step {step}") for group in recorded.groups]
    rewards = rewards_of(recorded)
    kept = advantages_of(recorded, platform.device)
    changed = config.algorithm != own.algorithm
    advantages = compute_advantages(rewards.to(platform.device), config.algorithm) if changed else kept
    processor = PromptProcessor(start, pad_to_square=config.data.pad_to_square)
    builder = batch_builder(processor, config, grid, learner.architecture)
    prompts = Prompts(datasets[0], [group.record_index for group in recorded.groups])
    trained_on = without_truncated(groups, advantages, config.algorithm)
    batches = builder.from_rollouts(
        prompts, trained_on.groups, trained_on.advantages, config.optimizer.updates_per_step
    )

    health = Health(config.health, component_weights(rewards.names, config.algorithm))

    row = {row["step"]: row for row in read_metrics(folder.root)}.get(step, {})
    # Of captions sampled ahead, the engine's mismatch was measured under weights that are gone: what is recorded holds.
    mismatch = row.get("rollout/logprob_difference", 0.0) if config.rollout.ahead else None

    def accept(result: UpdateResult) -> bool:
        try:
            return health.accepts(step, result, mismatch)
        except Unhealthy:  # the run ended here: show what it met
            return False

    began = time.perf_counter()
    learner.set_learning_rate(learning_rate(config.optimizer, step - 1))
    updates = update_policy(learner, batches.minibatches, accept)
    seconds = {"update": time.perf_counter() - began}
    metrics = step_metrics(groups, rewards, advantages, batches.assignments, updates, seconds)
    if config.rollout.ahead:
        metrics = {name: value for name, value in metrics.items() if not name.startswith(OFF_POLICY)}
    return Replayed(row, metrics, [replace(update, old_logprobs=()) for update in updates])


def replayable(folder: RunFolder, step: int) -> Path | None:
    """The checkpoint that `step` began with; None for the first step, which begins with the run's initial weights."""
    there = [
        number for number in steps_on_record(folder.rollouts) if number == 1 or _checkpoint(folder, number).is_dir()
    ]
    if step in there and read_step(folder.rollouts, step).header.keep == "all":
        return None if step == 1 else _checkpoint(folder, step)
    if step not in steps_on_record(folder.rollouts):
        why = "it is not on record"
    elif step not in there:
        why = f"there is no checkpoint of step {step - 1}, {_checkpoint(folder, step)}"
    else:
        why = "only the best and the worst captions are on record (rollouts.keep=extremes)"
        there.remove(step)
    remedy = f"steps that can: {ranges(there)}" if there else "none can; in a new run set rollouts.keep=all"
    raise UserError(
        f"step {step} of {folder.root} cannot be replayed: {why}",
        remedy=f"{remedy} (checkpoint.every=1 and a larger checkpoint.keep make more of them)",
    )


def _checkpoint(folder: RunFolder, step: int) -> Path:
    return folder.checkpoints / f"step_{step - 1:06d}"


def starting_folder(config: RunConfig, folder: RunFolder) -> Path:
    """The Hugging Face folder that the run's reinforcement learning began with."""
    if config.warmup.steps:
        start = folder.warmed_up
    else:
        start = Path(config.model.path) if config.model.path is not None else folder.initial
    if not start.is_dir():
        raise UserError(f"{start} is not there", remedy="bring back what the run began with")
    return start


def rewards_of(step: RecordedStep) -> RewardBatch:
    """The rewards as they were judged."""
    return build_reward_batch(
        [
            [CaptionScore(caption.components, caption.length, caption.reference_length) for caption in group.captions]
            for group in step.groups
        ]
    )


def advantages_of(step: RecordedStep, device: torch.device) -> Advantages:
    """What the update used, bit for bit."""
    captions = [caption for group in step.groups for caption in group.captions]
    names = list(captions[0].advantages)
    return Advantages(
        values=torch.tensor([caption.advantage for caption in captions], dtype=torch.float32, device=device),
        per_component=torch.tensor(
            [[caption.advantages[name] for caption in captions] for name in names], dtype=torch.float32, device=device
        ),
        gated=torch.tensor([caption.gated for caption in captions], device=device),
    )


def table(replayed: Replayed) -> list[str]:
    """Lines for a console: each number as recorded, as replayed, and their difference."""
    lines = [
        f"update {number}: loss {update.loss:.9g}, gradient norm {update.gradient_norm:.9g}, "
        f"{update.metrics['tokens']:.0f} tokens{'' if update.applied else ', left out'}"
        for number, update in enumerate(replayed.updates, start=1)
    ]
    if not replayed.recorded:
        lines.append("The run did not finish this step: nothing to compare with.")
    lines.append(f"{'':38}{'recorded':>16}{'replayed':>16}{'difference':>12}")
    for name in replayed.compared:
        ours, theirs = replayed.metrics[name], replayed.recorded.get(name, math.nan)
        same = ours == theirs or (math.isnan(ours) and math.isnan(theirs))
        lines.append(f"{name:38}{theirs:16.9g}{ours:16.9g}{'0' if same else format(ours - theirs, '.2g'):>12}")
    return lines
