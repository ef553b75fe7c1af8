"""The datasets that a run's configuration names."""

import hashlib
from functools import partial

from balcap_mega.config.schema import DataConfig
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.images import DaliDecoder, PilDecoder
from balcap_mega.data.jsonl import read_jsonl
from balcap_mega.data.parquet import ParquetFiles
from balcap_mega.data.records import CaptionDataset
from balcap_mega.data.scenes.dataset import ScenesDataset
from balcap_mega.data.sharegpt4v import read_sharegpt4v
from balcap_mega.errors import UserError

DALI_TOGETHER = 8  # pictures: enough for its threads, and soon done

# Those of one file whose images are files.
READERS = {"sharegpt4v": read_sharegpt4v, "jsonl": read_jsonl}


def build_datasets(config: DataConfig, seed: int) -> tuple[CaptionDataset, CaptionDataset]:
    """The training and the evaluation dataset of a run, which share no image.

    A file's held-out images depend on its first images alone (`data.eval_among`), not on the seed or on later rows.
    """
    if config.source == "scenes":
        return (
            ScenesDataset(config.train_size, seed, "train"),
            ScenesDataset(config.eval_size, seed, "eval"),
        )
    embedded = ParquetFiles(config.path, config.columns) if config.source == "parquet" else None
    read = partial(READERS[config.source], config.path) if embedded is None else embedded.rows
    dali = config.image_backend == "dali"
    dataset = ImageFileDataset(
        read(config.image_prefixes),
        config.image_root or ".",
        embedded=embedded,
        decode=DaliDecoder(threads=max(config.threads, 1)) if dali else PilDecoder(),
        max_pixels=config.max_pixels,
        max_missing_fraction=config.max_missing_fraction,
        together=DALI_TOGETHER if dali else 1,
    )
    images = list(dict.fromkeys(row.image for row in dataset.rows))
    if len(images) <= config.eval_size:
        raise UserError(
            f"data.path={config.path} has {len(images)} images; data.eval_size={config.eval_size} are held out",
            remedy="lower data.eval_size",
        )
    among = images[: max(config.eval_among or 0, config.eval_size)]
    held_out = set(sorted(among, key=lambda image: hashlib.sha256(image.encode()).digest())[: config.eval_size])
    return dataset.subset(set(images) - held_out, config.train_size), dataset.subset(held_out)
