"""The parts of a training step, built and put together."""

import logging
from pathlib import Path

import torch

from balcap_mega.algorithm.advantages import component_weights
from balcap_mega.algorithm.words import count_words
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionDataset
from balcap_mega.data.sampler import RecordSampler
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.factory import build_rewards
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit
from balcap_mega.rollout.replicas import Replica
from balcap_mega.training.batches import batch_builder
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.guard.health import Health
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.learner import Learner
from balcap_mega.training.record.recorder import Recorder
from balcap_mega.training.trainer import Trainer

log = logging.getLogger(__name__)


def build_learner(config: RunConfig, start: Path, platform: Platform) -> Learner:
    """The learner of reinforcement learning, with the weights of `start`. A collective."""
    return Learner(
        start,
        config.model,
        config.parallel,
        config.optimizer,
        config.algorithm,
        platform,
        temperature=config.rollout.temperature,
        max_response_length=config.rollout.max_tokens,
    )


def build_trainer(
    config: RunConfig,
    start: Path,
    dataset: CaptionDataset,
    grid: ProcessGrid,
    platform: Platform,
    folder: RunFolder,
    stop: StopRequest,
) -> Trainer:
    """The learner with the weights of `start`, the engine beside it, and what lies between them. A collective."""
    learner = build_learner(config, start, platform)
    learner.offload()  # the engine claims its share of the device's memory as it is built
    engine = RolloutEngine(
        start,
        config.rollout,
        device=platform.device,
        dtype=platform.dtype(config.model.dtype),
        seed=config.seed,
        sleeps=learner.shares_device,
        pad_to_square=config.data.pad_to_square,
    )
    processor = PromptProcessor(start, pad_to_square=config.data.pad_to_square)
    if config.data.source != "scenes" and processor.seen_share((4, 3)) < 1 and torch.distributed.get_rank() == 0:
        log.warning(
            "the model's image processor cuts pictures to their centre: it sees %.0f %% of one of 4:3, while judge and "
            "reference cover the whole; data.pad_to_square=true shows it all",
            100 * processor.seen_share((4, 3)),
        )
    return Trainer(
        config=config,
        dataset=dataset,
        sampler=RecordSampler(len(dataset), config.seed, config.rollout.prompts_per_step),
        length=count_words if config.algorithm.gate.unit == "words" else processor.count_tokens,
        rewards=build_rewards(config.rewards, sharers=Replica.current(config.rollout.tensor_parallel).count),
        engine=engine,
        replica=Replica.current(config.rollout.tensor_parallel),
        batches=batch_builder(processor, config, grid, learner.architecture),
        learner=learner,
        refit=build_refit(learner.policy, engine, config.parallel),
        checkpoints=CheckpointWriter(
            folder.checkpoints,
            platform,
            keep=config.checkpoint.keep,
            timeout_seconds=config.checkpoint.timeout_seconds,
        ),
        stop=stop,
        health=Health(config.health, component_weights(tuple(config.rewards.components), config.algorithm)),
        recorder=Recorder(folder.rollouts, config.rollouts, enabled=torch.distributed.get_rank() == 0),
    )
