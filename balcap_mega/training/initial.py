"""The Hugging Face folder that reinforcement learning starts from: given, or made small and random; then warmed up."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from balcap_mega.config.schema import HabitsConfig, RunConfig
from balcap_mega.data.records import CaptionDataset, CaptionRecord
from balcap_mega.data.scenes import SceneRecord, flawed_caption, habitual_caption
from balcap_mega.models.huggingface.transfer import export_checkpoint
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.parallel.agreement import from_first_rank
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.parallel.platform import Platform
from balcap_mega.training.batches import batch_builder
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.warmup import warm_up

TOKENIZER_TEXTS = 1000


def initial_checkpoint(config: RunConfig, folder: RunFolder, dataset: CaptionDataset) -> Path:
    """`model.path`, or on the first rank a new random checkpoint of the family `model.tiny` names. A collective."""
    if config.model.path is not None:
        return Path(config.model.path)
    if torch.distributed.get_rank() == 0 and not folder.initial.exists():
        unfinished = folder.initial.with_name("initial.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        records = [dataset[index] for index in range(min(TOKENIZER_TEXTS, len(dataset)))]
        target = partial(warm_up_target, habits=config.warmup.habits)
        texts = [text for record in records for text in (record.prompt, record.reference, target(record, 0))]
        write_tiny_checkpoint(unfinished, config.model.tiny, texts, seed=config.seed)
        unfinished.rename(folder.initial)
    torch.distributed.barrier()
    return folder.initial


def warmed_up_checkpoint(
    config: RunConfig,
    initial: Path,
    folder: RunFolder,
    dataset: CaptionDataset,
    grid: ProcessGrid,
    platform: Platform,
    on_step: Callable[[int, UpdateResult], None],
) -> Path:
    """`initial` after `warmup.steps` supervised steps, vision included; done once a run, whole or not at all."""
    if config.warmup.steps == 0:
        return initial
    if not from_first_rank(folder.warmed_up.exists()):
        model = config.model.model_copy(update={"freeze_vision": False})
        # A trained tower leaves buckets unfilled where a rank has no image.
        parallel = config.parallel.model_copy(update={"overlap_grad_reduce": False, "bucket_size": None})
        learner = Learner(initial, model, parallel, config.optimizer, config.algorithm, platform)
        processor = PromptProcessor(initial, pad_to_square=config.data.pad_to_square)
        batches = batch_builder(processor, config, grid, learner.architecture)
        target = partial(warm_up_target, habits=config.warmup.habits)
        warm_up(learner, batches, dataset, target, config.warmup, seed=config.seed, on_step=on_step)
        export_checkpoint(learner.policy, initial, folder.warmed_up)
    return folder.warmed_up


def warm_up_target(record: CaptionRecord, step: int, habits: HabitsConfig | None) -> str:
    """What the warm-up imitates: of scenes a flawed caption, or one with these habits, anew at each step; else the
    reference."""
    if not isinstance(record, SceneRecord):
        return record.reference
    return flawed_caption(record.scene, step) if habits is None else habitual_caption(record.scene, step, habits)
