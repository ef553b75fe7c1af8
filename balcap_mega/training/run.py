"""A whole run: prepare the policy, evaluate, improve it step by step, evaluate again, and leave everything behind."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch

from balcap_mega.algorithm.words import count_words
from balcap_mega.config.load import dump_config
from balcap_mega.config.preflight import preflight
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionDataset
from balcap_mega.data.sampler import RecordSampler
from balcap_mega.data.sources import build_datasets
from balcap_mega.models.huggingface.transfer import export_checkpoint
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.agreement import from_first_rank
from balcap_mega.parallel.groups import ModelLayout, initialize_parallel, world_size
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.factory import build_judge
from balcap_mega.rewards.missing import TooManyMissing
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit
from balcap_mega.rollout.replicas import Replica
from balcap_mega.training.batches import Prompts, batch_builder
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from balcap_mega.training.folder import RunFolder, full_disk_is_named, write_json, write_text
from balcap_mega.training.guard.health import Health, Unhealthy
from balcap_mega.training.guard.signals import Stopped, StopRequest, end_with_launcher
from balcap_mega.training.guard.watchdog import Watchdog, collective_timeout, stuck_seconds
from balcap_mega.training.heldout import HeldOutResult, evaluate_held_out, read_result, write_result
from balcap_mega.training.initial import initial_checkpoint, warmed_up_checkpoint
from balcap_mega.training.judging import patience
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.observe.console import Console
from balcap_mega.training.observe.metrics import MetricsLogger, PhaseTimer, read_metrics
from balcap_mega.training.observe.report import write_report
from balcap_mega.training.trainer import Trainer


def run(config: RunConfig) -> None:
    """Train as `config` says; go on from the last checkpoint in `config.output_dir` if there is one.

    SIGINT, SIGTERM and SIGUSR1 end it before its next update, with a checkpoint. Raises UserError for bad input.
    """
    resuming = preflight(config, world_size())
    end_with_launcher()
    stop = StopRequest(config.checkpoint.grace_seconds)
    platform = Platform.resolve(config.parallel.device)
    layout = initialize_parallel(config.parallel, platform, config.seed, timeout_seconds=collective_timeout(config))
    watchdog = Watchdog(stuck_seconds=stuck_seconds(config), silence_seconds=config.parallel.silence_seconds)
    leads = torch.distributed.get_rank() == 0
    folder = RunFolder(Path(config.output_dir))
    with watchdog, full_disk_is_named(folder.root), folder.held() if leads else nullcontext():
        if leads and not resuming:
            write_text(folder.config, dump_config(config))
        torch.distributed.barrier()
        console = Console(config, layout, enabled=leads)
        try:
            train(config, folder, layout, platform, console, stop)
        except Stopped as signal:
            console.stopped(str(signal))


def train(
    config: RunConfig,
    folder: RunFolder,
    layout: ModelLayout,
    platform: Platform,
    console: Console,
    stop: StopRequest,
) -> None:
    """The run itself, in a folder that is its own. Raises Stopped, after a checkpoint, when asked to stop."""
    leads, phase = torch.distributed.get_rank() == 0, PhaseTimer()

    def warmup_step(number: int, result: UpdateResult) -> None:
        console.warmup_step(number, result)
        stop.check(platform.device)

    train_set, eval_set = build_datasets(config.data, config.seed)
    with phase("warmup"):
        initial = initial_checkpoint(config, folder, train_set)
        start = warmed_up_checkpoint(config, initial, folder, train_set, layout, platform, warmup_step)
    with phase("setup"):
        trainer = build_trainer(config, start, train_set, layout, platform, folder, stop)
        first_step = trainer.resume()
        trainer.refit.run()

    def held_out() -> HeldOutResult:
        with phase("evaluation"):
            records = Prompts(eval_set, range(len(eval_set)))
            return evaluate_held_out(
                trainer.engine,
                trainer.replica,
                trainer.judge,
                records,
                trainer.length,
                patience(config.rewards),
            )

    # A run that goes on reads what it found before its first step.
    before = held_out() if first_step == 0 else read_result(folder.before)
    if leads and first_step == 0:
        write_result(folder.before, before)
    console.evaluation("before", before.scores)
    if leads:
        trainer.health.replay(row for row in read_metrics(folder.root) if row["step"] <= first_step)
    trainer.health.streaks = from_first_rank(trainer.health.streaks)
    with MetricsLogger(folder.root, first_step, enabled=leads) as log, phase("reinforcement"):
        for step in range(first_step, config.steps):
            try:
                stop.check(platform.device)
                metrics = trainer.step(step)
            except (Stopped, TooManyMissing):  # on all ranks, before the update: the steps so far are worth keeping
                trainer.save(step)
                trainer.checkpoints.finish()
                raise
            except Unhealthy:  # maybe not before the step's first update; a checkpoint on its way is good
                trainer.checkpoints.finish()
                raise
            if config.eval_every and (step + 1) % config.eval_every == 0:
                metrics |= {f"held_out/{name}": score for name, score in held_out().scores.items()}
            findings = trainer.health.observe(step + 1, metrics)
            metrics |= {f"health/{finding.check}": finding.value for finding in findings}
            log(step, metrics)
            console.step(step, metrics)
            console.findings(findings)
            if fatal := [finding for finding in findings if finding.policy == "stop"]:
                if all(finding.sound for finding in fatal):
                    trainer.save(step + 1)
                trainer.checkpoints.finish()
                raise Unhealthy(fatal[0])
            trainer.checkpoints.poll()
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                trainer.save(step + 1)
        trainer.checkpoints.finish()
    after = held_out()
    console.evaluation("after", after.scores)
    trainer.judge.close()
    with phase("export"):
        if leads:
            shutil.rmtree(folder.policy, ignore_errors=True)  # of a run that was shorter then
        torch.distributed.barrier()
        export_checkpoint(trainer.learner.policy, start, folder.policy)
    if leads:
        write_result(folder.after, after)
        write_json(folder.summary, {"before": before.scores, "after": after.scores, "seconds": phase.seconds})
        write_report(folder, config, before, after, eval_set)
    console.finished(folder.root)


def build_trainer(
    config: RunConfig,
    start: Path,
    dataset: CaptionDataset,
    layout: ModelLayout,
    platform: Platform,
    folder: RunFolder,
    stop: StopRequest,
) -> Trainer:
    """The learner with the weights of `start`, the engine beside it, and what lies between them. A collective."""
    learner = Learner(
        start,
        config.model,
        config.parallel,
        config.optimizer,
        config.algorithm,
        platform,
        temperature=config.rollout.temperature,
        max_response_length=config.rollout.max_tokens,
    )
    learner.offload()  # the engine claims its share of the device's memory as it is built
    engine = RolloutEngine(
        start,
        config.rollout,
        device=platform.device,
        dtype=platform.dtype(config.model.dtype),
        seed=config.seed,
        sleeps=learner.shares_device,
    )
    processor = PromptProcessor(start)
    return Trainer(
        config=config,
        dataset=dataset,
        sampler=RecordSampler(len(dataset), config.seed, config.rollout.prompts_per_step),
        length=count_words if config.algorithm.gate.unit == "words" else processor.count_tokens,
        judge=build_judge(config.rewards),
        engine=engine,
        replica=Replica.current(config.rollout.tensor_parallel),
        batches=batch_builder(processor, config, layout, learner.architecture),
        learner=learner,
        refit=build_refit(learner.policy, engine, config.parallel),
        checkpoints=CheckpointWriter(
            folder.checkpoints,
            platform,
            keep=config.checkpoint.keep,
            timeout_seconds=config.checkpoint.timeout_seconds,
        ),
        stop=stop,
        health=Health(config.health, config.algorithm.weights),
    )
