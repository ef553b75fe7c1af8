"""A whole run: prepare the policy, evaluate, improve it step by step, evaluate again, and leave everything behind."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch

from balcap_mega.config.load import dump_config
from balcap_mega.config.preflight import check_batch, preflight
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionDataset
from balcap_mega.data.sources import build_datasets
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.huggingface.hub import with_fetched_model
from balcap_mega.models.huggingface.transfer import export_checkpoint
from balcap_mega.parallel.agreement import from_first_rank
from balcap_mega.parallel.groups import ProcessGrid, end_parallel, initialize_parallel, world_size
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.factory import check_rewards
from balcap_mega.training.benchmarks import Benchmarks
from balcap_mega.training.build import build_trainer
from balcap_mega.training.folder import RunFolder, full_disk_is_named, write_json, write_text
from balcap_mega.training.guard.signals import Stopped, StopRequest, end_with_launcher
from balcap_mega.training.guard.watchdog import Watchdog, collective_timeout, stuck_seconds
from balcap_mega.training.heldout import HeldOutResult, read_result, write_result
from balcap_mega.training.initial import initial_checkpoint, warmed_up_checkpoint
from balcap_mega.training.inputs import agreed_inputs, write_inputs
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.observe.console import Console
from balcap_mega.training.observe.metrics import MetricsLogger, PhaseTimer, read_metrics
from balcap_mega.training.observe.profile import profiled
from balcap_mega.training.observe.report import SAMPLES, write_report
from balcap_mega.training.prompt_fit import fitting
from balcap_mega.training.record.page import write_changes
from balcap_mega.training.trainer import Trainer


def run(config: RunConfig) -> None:
    """Train as `config` says; go on from the last checkpoint in `config.output_dir` if there is one.

    SIGINT, SIGTERM and SIGUSR1 end it before its next update, with a checkpoint. Raises UserError for bad input.
    """
    check_batch(config, world_size())  # before what takes time
    config = with_fetched_model(config)
    resuming = preflight(config, world_size(), FAMILIES)
    check_rewards(config.rewards)
    end_with_launcher()
    stop = StopRequest(config.checkpoint.grace_seconds)
    platform = Platform.resolve(config.parallel.device)
    grid = initialize_parallel(config.parallel, platform, config.seed, timeout_seconds=collective_timeout(config))
    watchdog = Watchdog(stuck_seconds=stuck_seconds(config), silence_seconds=config.parallel.silence_seconds)
    leads = torch.distributed.get_rank() == 0
    folder = RunFolder(Path(config.output_dir))
    with watchdog, full_disk_is_named(folder.root), folder.held() if leads else nullcontext():
        train_set, eval_set = build_datasets(config.data, config.seed)
        inputs = agreed_inputs(config, folder, train_set, eval_set)
        if config.model.path is not None:
            train_set, eval_set = fitting(config, (train_set, eval_set), platform.device)
        if leads:  # not before: what is refused so far may be mended by other values of the configuration
            if not resuming:
                write_text(folder.config, dump_config(config))
            write_inputs(folder, inputs)
        torch.distributed.barrier()
        console = Console(config, grid, inputs, enabled=leads)
        try:
            train(config, folder, train_set, eval_set, grid, platform, console, stop)
        except Stopped as signal:
            console.stopped(str(signal))
        end_parallel()


def train(
    config: RunConfig,
    folder: RunFolder,
    train_set: CaptionDataset,
    eval_set: CaptionDataset,
    grid: ProcessGrid,
    platform: Platform,
    console: Console,
    stop: StopRequest,
) -> None:
    """The run itself, in a folder that is its own. Raises Stopped, after a checkpoint, when asked to stop."""
    phase = PhaseTimer()
    with phase("warmup"):
        start = prepare(config, folder, train_set, grid, platform, console, stop)
    benchmarks = Benchmarks(config, folder.root, platform.device)
    with phase("setup"):
        trainer = build_trainer(config, start, train_set, grid, platform, folder, stop)
    with closed_in_order(trainer):
        reinforce(trainer, start, eval_set, folder, console, benchmarks, phase)


@contextmanager
def closed_in_order(trainer: Trainer) -> Iterator[None]:
    """An engine that is done with, or was stopped, is closed on all ranks; after an error the process just ends.

    Before that, however it ends, the threads that prepare pictures, with the engine too.
    """
    try:
        with closing(trainer.pictures.ahead):
            yield
    except Stopped:
        trainer.engine.close()
        raise
    trainer.engine.close()


def reinforce(
    trainer: Trainer,
    start: Path,
    eval_set: CaptionDataset,
    folder: RunFolder,
    console: Console,
    benchmarks: Benchmarks,
    phase: PhaseTimer,
) -> None:
    """From the policy in `start`, or the last checkpoint, to the trained one and the report."""
    with phase("setup"):
        first_step = trainer.resume()
        trainer.refit.run()
    with phase("evaluation"):
        before = evaluation_before(trainer, first_step, eval_set, folder)
    console.evaluation("before", before.scores, before.counts)
    with phase("reinforcement"):
        improve(trainer, first_step, eval_set, folder, console, benchmarks)
    with phase("export"):
        export(trainer, start, folder)
    with phase("evaluation"):
        after = evaluation_after(trainer, eval_set, folder)
    console.evaluation("after", after.scores, after.counts)
    trainer.rewards.close()
    if torch.distributed.get_rank() == 0:
        write_result(folder.after, after)
        counts = {"before": before.counts, "after": after.counts}
        scores = {"before": before.scores, "after": after.scores}
        write_json(folder.summary, {**scores, "captions": counts, "seconds": phase.seconds})
        changes = write_changes(folder, before, after, eval_set)
        write_report(folder, trainer.config, console.inputs, before, after, eval_set, changes)
    console.finished(folder.root)


def prepare(
    config: RunConfig,
    folder: RunFolder,
    train_set: CaptionDataset,
    grid: ProcessGrid,
    platform: Platform,
    console: Console,
    stop: StopRequest,
) -> Path:
    """The Hugging Face folder that reinforcement learning starts from, warmed up if the configuration asks for it."""

    def on_step(number: int, result: UpdateResult) -> None:
        console.warmup_step(number, result)
        stop.check(platform.device)

    initial = initial_checkpoint(config, folder, train_set)
    return warmed_up_checkpoint(config, initial, folder, train_set, grid, platform, on_step)


def evaluation_before(trainer: Trainer, first_step: int, eval_set: CaptionDataset, folder: RunFolder) -> HeldOutResult:
    """The held-out evaluation before the first step, which a run that goes on reads."""
    if first_step > 0:
        return read_result(folder.before)
    before = trainer.evaluate(eval_set, quotes=range(SAMPLES))
    if torch.distributed.get_rank() == 0:
        write_result(folder.before, before)
    return before


def improve(
    trainer: Trainer,
    first_step: int,
    eval_set: CaptionDataset,
    folder: RunFolder,
    console: Console,
    benchmarks: Benchmarks,
) -> None:
    """The steps from `first_step` on: each is taken, evaluated when due, logged, checked, and saved when due."""
    config, leads = trainer.config, torch.distributed.get_rank() == 0
    if leads:
        trainer.health.replay(row for row in read_metrics(folder.root) if row["step"] <= first_step)
    trainer.health.streaks = from_first_rank(trainer.health.streaks)
    benchmarks.go_on(first_step)
    trainer.recorder.go_on(first_step)
    with closing_record(trainer), MetricsLogger(folder.root, first_step, enabled=leads) as log:
        for step in range(first_step, config.steps):
            with profiling(trainer, folder, step + 1):
                metrics = trainer.step(step)
            if config.eval_every and (step + 1) % config.eval_every == 0:
                metrics |= evaluation_between(trainer, step + 1, eval_set, folder, console)
            benchmarks.caption(trainer.engine, trainer.replica, step + 1)
            findings = trainer.health.observe(step + 1, metrics)
            metrics |= {f"health/{finding.check}": finding.value for finding in findings}
            log(step, metrics)
            console.step(step, metrics)
            console.findings(findings)
            trainer.refuse(findings, step + 1)
            benchmarks.report(log.late)
            trainer.checkpoints.poll()
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                trainer.recorder.finish()  # what a checkpoint has behind it is never taken again
                trainer.save(step + 1)
        trainer.checkpoints.finish()
        benchmarks.finish(log.late)


def profiling(trainer: Trainer, folder: RunFolder, step: int) -> AbstractContextManager[None]:
    """Around a step: it is profiled where `profile.steps` names it, counted from 1."""
    if step not in trainer.config.profile.steps:
        return nullcontext()
    return profiled(folder.profile, step, torch.distributed.get_rank(), trainer.learner.platform.device)


@contextmanager
def closing_record(trainer: Trainer) -> Iterator[None]:
    """However it ends, the steps so far are on record, one that failed among them."""
    try:
        yield
    finally:
        trainer.recorder.finish()


def evaluation_between(
    trainer: Trainer, steps: int, eval_set: CaptionDataset, folder: RunFolder, console: Console
) -> dict[str, float]:
    """Held-out metrics after so many steps; where the evaluation fails, a warning: training does not need them.

    The captions of the report's images are kept.
    """
    try:
        result = trainer.evaluate(eval_set)
    except Exception as error:
        console.warning(f"no held-out scores after step {steps}: {error}")
        return {"held_out/failed": 1.0}
    if torch.distributed.get_rank() == 0 and trainer.config.rollouts.keep != "none":
        try:
            folder.rollouts.mkdir(exist_ok=True)
            write_result(folder.between(steps), HeldOutResult(result.captions[:SAMPLES]))
        except OSError as error:
            console.warning(f"no held-out captions of step {steps} on record: {error}")
    return result.metrics()


def evaluation_after(trainer: Trainer, eval_set: CaptionDataset, folder: RunFolder) -> HeldOutResult:
    """The held-out evaluation of a policy that is exported already. An error says that it is."""
    try:
        return trainer.evaluate(eval_set, quotes=range(SAMPLES))
    except Exception as error:
        error.add_note(f"the trained policy is in {folder.policy}; the same command again evaluates it")
        raise


def export(trainer: Trainer, start: Path, folder: RunFolder) -> None:
    """The trained policy as a Hugging Face folder, with the files of `start` that are no weights. A collective."""
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder.policy, ignore_errors=True)  # of a run that was shorter then
    torch.distributed.barrier()
    export_checkpoint(trainer.learner.policy, start, folder.policy, pad_to_square=trainer.config.data.pad_to_square)
