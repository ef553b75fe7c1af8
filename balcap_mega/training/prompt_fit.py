"""Which prompts fit the engine, told before a weight is loaded: from one prompt rendered, then from image headers."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.headers import Unreadable
from balcap_mega.data.records import CaptionDataset
from balcap_mega.errors import UserError
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.agreement import failing_together
from balcap_mega.parallel.progress import progress

log = logging.getLogger(__name__)

READERS = 16  # threads: a header on a network disk is mostly waiting
NAMED = 5  # records in a message


@dataclass(frozen=True)
class LongPrompt:
    """A record whose prompt and picture take `tokens`, which leave the engine no room for a caption."""

    index: int
    image: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.image} ({self.tokens} tokens)"


def fitting(config: RunConfig, datasets: Sequence[CaptionDataset], device: torch.device) -> list[CaptionDataset]:
    """The datasets without the records that do not fit `rollout.max_model_len`, the same on all ranks. A collective.

    Raises UserError for a checkpoint whose chat template cannot ask about an image; for records that do not fit under
    `data.too_long=refuse`; and for more of them than `data.max_missing_fraction` under `leave_out`.
    """
    with failing_together(device):
        processor = PromptProcessor(config.model.path, pad_to_square=config.data.pad_to_square)
        check_length(processor.check(datasets[0][0]), config)
    return [
        _fitting(dataset, processor, config, device) if isinstance(dataset, ImageFileDataset) else dataset
        for dataset in datasets
    ]


def check_length(tokens: int, config: RunConfig) -> None:
    """Raise UserError for the first prompt of `tokens`, where no picture can be blamed alone."""
    if tokens >= config.rollout.max_model_len and config.data.source == "scenes":
        raise UserError(
            f"a prompt with its picture takes {tokens} tokens, and rollout.max_model_len is "
            f"{config.rollout.max_model_len}",
            remedy="raise rollout.max_model_len",
        )


def long_prompts(
    dataset: ImageFileDataset, indices: Sequence[int], processor: PromptProcessor, most: int
) -> list[LongPrompt]:
    """Those of `indices` whose prompt takes `most` tokens or more; a picture that cannot be read is not one of them."""
    with ThreadPoolExecutor(READERS) as pool:
        sizes = pool.map(lambda index: _size(dataset, index), indices)
        found = []
        for index, size in zip(indices, sizes, strict=True):
            progress.mark()
            if size is None:
                continue
            row = dataset.rows[index]
            tokens = processor.prompt_length(row.prompt, size)
            if tokens >= most:
                found.append(LongPrompt(index, row.image, tokens))
    return found


def _size(dataset: ImageFileDataset, index: int) -> tuple[int, int] | None:
    try:
        return dataset.picture_size(index)
    except Unreadable:
        return None  # and another record takes its place when it is asked for


def _fitting(
    dataset: ImageFileDataset, processor: PromptProcessor, config: RunConfig, device: torch.device
) -> ImageFileDataset:
    """Each rank reads its share of the headers; all of them then leave out the same records."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with failing_together(device):
        mine = long_prompts(dataset, range(rank, len(dataset), world), processor, config.rollout.max_model_len)
    shares: list[list[LongPrompt]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, mine)
    found = sorted((prompt for share in shares for prompt in share), key=lambda prompt: prompt.index)
    if not found:
        return dataset
    refuse_too_long(found, len(dataset), config)
    if rank == 0:
        log.warning("%s", _problem(found, len(dataset), config) + "; left out (data.too_long=leave_out)")
    return dataset.without({prompt.index for prompt in found})


def refuse_too_long(found: Sequence[LongPrompt], total: int, config: RunConfig) -> None:
    """Raise UserError unless `data.too_long` and `data.max_missing_fraction` let these records be left out."""
    shrink = "set" if config.data.max_pixels is None else "lower"
    remedy = f"{shrink} data.max_pixels, raise rollout.max_model_len (and packing.row_tokens with it)"
    if config.data.too_long == "refuse":
        raise UserError(_problem(found, total, config), remedy=f"{remedy}, or set data.too_long=leave_out")
    if len(found) > config.data.max_missing_fraction * total:
        raise UserError(
            f"{_problem(found, total, config)}; data.max_missing_fraction is {config.data.max_missing_fraction:g}",
            remedy=f"{remedy}, or raise data.max_missing_fraction",
        )


def _problem(found: Sequence[LongPrompt], total: int, config: RunConfig) -> str:
    names = ", ".join(map(str, found[:NAMED])) + (", ..." if len(found) > NAMED else "")
    return (
        f"{len(found)} of {total} records of data.path={config.data.path} leave no room for a caption in "
        f"rollout.max_model_len={config.rollout.max_model_len}: {names}"
    )
