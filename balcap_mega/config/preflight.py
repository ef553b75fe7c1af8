"""Checks that need more than the config itself: the world size, files, the model folder, what the output folder holds.

All of them read only, so every rank runs them, before any process group, model or engine exists.
"""

import os
from collections.abc import Collection, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from pydantic_core import from_json

from balcap_mega.config.load import load_config
from balcap_mega.config.schema import (
    MAY_CHANGE,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    Section,
)
from balcap_mega.errors import UserError

RESOLVED_CONFIG = "config.yaml"  # `dump_config` of the run an output folder holds
LOCK_FILE = "lock"  # a run's first file, with the config's `.partial`: all that one killed at its start leaves behind
NEEDS_GPU = {  # keys, and the value of each that a CPU can do
    "model.fp8": "none",
    "rollout.fp8": False,
    "model.apply_rope_fusion": False,
    "model.gradient_accumulation_fusion": False,
    "optimizer.precision_aware": False,
    "optimizer.exp_avg_dtype": "float32",
    "optimizer.exp_avg_sq_dtype": "float32",
}
PROCESSOR_FILES = (  # in each row, one of them
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),  # transformers before and since version 5
)


def preflight(config: RunConfig, world_size: int, families: Collection[str]) -> bool:
    """Check a run before any work; return whether `config.output_dir` holds this very run, to be gone on with.

    families: the names of the model families that can be trained
    Raises UserError naming the key, its value and the remedy.
    """
    check_batch(config, world_size)
    check_device(config)
    check_data(config.data)
    if config.model.tiny is not None and config.model.tiny not in families:
        raise UserError(
            f"model.tiny={config.model.tiny} is no model family", remedy=f"use one of: {', '.join(families)}"
        )
    if config.model.path is not None:
        check_model(config.model, config.parallel, config.rollout, families)
    return check_output(config)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Copies of the model that `world_size` ranks hold. Raises UserError where they do not tile the ranks."""
    shards = parallel.tensor * parallel.pipeline
    if world_size % shards:
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} does not divide the "
            f"{world_size} processes started",
            remedy=f"start a multiple of {shards} (torchrun --nproc-per-node) or lower one of them",
        )
    return world_size // shards


def check_batch(config: RunConfig, world_size: int) -> None:
    """Do the parallel sizes divide the world, and the prompts of a step the ranks and updates that share them?"""
    parallel, rollout = config.parallel, config.rollout
    data_parallel = data_parallel_size(parallel, world_size)
    if world_size % rollout.tensor_parallel:
        raise UserError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {world_size} processes started",
            remedy=f"set it to a divisor of {world_size}",
        )
    replicas = world_size // rollout.tensor_parallel
    updates = config.optimizer.updates_per_step
    if rollout.prompts_per_step % (data_parallel * updates):
        raise UserError(
            f"rollout.prompts_per_step={rollout.prompts_per_step} cannot be shared evenly by data-parallel size "
            f"{data_parallel} x optimizer.updates_per_step={updates}",
            remedy=f"set rollout.prompts_per_step to a multiple of {data_parallel * updates}",
        )
    if config.warmup.steps and config.warmup.batch_size % data_parallel:
        raise UserError(
            f"warmup.batch_size={config.warmup.batch_size} cannot be cut into {data_parallel} data-parallel shares",
            remedy=f"set warmup.batch_size to a multiple of {data_parallel}",
        )
    if rollout.prompts_per_step % replicas:
        raise UserError(
            f"rollout.prompts_per_step={rollout.prompts_per_step} cannot be shared evenly by the {replicas} engines "
            f"that rollout.tensor_parallel={rollout.tensor_parallel} leaves of {world_size} processes",
            remedy=f"set rollout.prompts_per_step to a multiple of {replicas}",
        )
    if rollout.prompts_per_step > config.data.train_size:
        raise UserError(
            f"rollout.prompts_per_step={rollout.prompts_per_step} exceeds data.train_size={config.data.train_size}",
            remedy="raise data.train_size or lower rollout.prompts_per_step",
        )
    if rollout.max_tokens >= rollout.max_model_len:
        raise UserError(
            f"rollout.max_tokens={rollout.max_tokens} leaves no room for the image and the prompt in "
            f"rollout.max_model_len={rollout.max_model_len}",
            remedy="raise rollout.max_model_len or lower rollout.max_tokens",
        )
    if config.packing.row_tokens < rollout.max_model_len:
        raise UserError(
            f"packing.row_tokens={config.packing.row_tokens} is less than rollout.max_model_len="
            f"{rollout.max_model_len}: one image with one caption might not fit a row",
            remedy=f"set packing.row_tokens to at least {rollout.max_model_len}",
        )


def check_device(config: RunConfig) -> None:
    """Is there a GPU where one is asked for, and one for each process of this node?"""
    device, count = config.parallel.device, torch.cuda.device_count()
    if device == "cuda" and not count:
        raise UserError("parallel.device=cuda but no CUDA device is visible", remedy="set parallel.device=cpu or auto")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device != "cpu" and 0 < count < local:
        raise UserError(
            f"{local} processes were started on this node, which has {count} CUDA devices",
            remedy=f"start it with torchrun --nproc-per-node {count}",
        )
    asked = {key: value for key, plain in NEEDS_GPU.items() if (value := attrgetter(key)(config)) != plain}
    if asked and (device == "cpu" or not count):
        key, value = next(iter(asked.items()))
        raise UserError(
            f"{key}={_yaml(value)} needs a GPU and this run is on the CPU",
            remedy=f"set {' '.join(f'{key}={_yaml(NEEDS_GPU[key])}' for key in asked)}",
        )


def _yaml(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def check_data(data: DataConfig) -> None:
    """Can the annotations be read, and is the image folder there?"""
    if data.path is not None and not (data.source == "parquet" and os.path.isdir(data.path)):
        try:
            with open(data.path, "rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise UserError(
                f"cannot read data.path={data.path}: {error.strerror}", remedy="give the annotation file"
            ) from None
        if empty:
            raise UserError(
                f"data.path={data.path} is empty", remedy="give an annotation file with at least one record"
            )
    if data.image_root is not None and not os.path.isdir(data.image_root):
        raise UserError(
            f"data.image_root={data.image_root} is no folder", remedy="give the folder that holds the images"
        )


def check_model(
    model: ModelConfig, parallel: ParallelConfig, rollout: RolloutConfig, families: Collection[str]
) -> None:
    """Is `model.path` a whole Hugging Face checkpoint of a known family, which the parallel sizes can cut?"""
    folder, key = Path(model.path), f"model.path={model.path}"
    try:
        config = from_json((folder / "config.json").read_bytes())
    except OSError as error:
        raise UserError(
            f"{key} holds no readable config.json: {error.strerror}", remedy="give a Hugging Face model folder"
        ) from None
    except ValueError as error:
        raise UserError(f"{key}: config.json is not valid JSON: {error}", remedy="download the model again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in families:
        raise UserError(
            f"{key} is of architecture {kind!r}", remedy=f"give a checkpoint of one of: {', '.join(families)}"
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{key} holds no *.safetensors", remedy="convert it: model.save_pretrained(folder)")
    for names in PROCESSOR_FILES:
        if not any((folder / name).exists() for name in names):
            raise UserError(f"{key} lacks {' or '.join(names)}", remedy="save its processor there too")
    text = config.get("text_config", config)
    sizes = ("num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    if not isinstance(text, dict) or not all(isinstance(text.get(name, 1), int) for name in sizes):
        raise UserError(f"{key}: config.json has a text_config of another form", remedy="download the model again")
    check_shape(text, parallel, rollout)


def check_shape(text: dict[str, Any], parallel: ParallelConfig, rollout: RolloutConfig) -> None:
    """Can the language model be cut as asked? Sizes that a config leaves to its defaults are not checked."""
    for name, cut, key in (
        ("num_attention_heads", parallel.tensor, "parallel.tensor"),
        ("num_attention_heads", rollout.tensor_parallel, "rollout.tensor_parallel"),
    ):
        if text.get(name, 0) % cut:
            raise UserError(
                f"{key}={cut} does not divide the model's {name}={text[name]}", remedy=f"set {key} to a divisor of it"
            )
    layers = text.get("num_hidden_layers", parallel.pipeline)
    if layers < parallel.pipeline:
        raise UserError(
            f"parallel.pipeline={parallel.pipeline} is more than the model's {layers} layers",
            remedy=f"set it to at most {layers}",
        )
    longest = text.get("max_position_embeddings", rollout.max_model_len)
    if rollout.max_model_len > longest:
        raise UserError(
            f"rollout.max_model_len={rollout.max_model_len} is more than the model's {longest} positions",
            remedy=f"set rollout.max_model_len to at most {longest}",
        )


def check_output(config: RunConfig) -> bool:
    """Whether `output_dir` holds this run already; refuses one that holds another run, or files of no run."""
    folder = Path(config.output_dir)
    if not folder.exists():
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise UserError(f"output_dir={folder} cannot be made in {existing}", remedy="give a folder you may write")
        return False
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"output_dir={folder} is no folder you may write", remedy="give another output_dir")
    resolved = folder / RESOLVED_CONFIG
    if not resolved.exists():
        if not all(path.name == LOCK_FILE or path.suffix == ".partial" for path in folder.iterdir()):
            raise UserError(
                f"output_dir={folder} holds files but no {RESOLVED_CONFIG}, so it is no run of this program",
                remedy="give an empty or a new output_dir",
            )
        return False
    for key, old, new in _differences(load_config(resolved), config):
        raise UserError(
            f"output_dir={folder} holds another run: {key} was {old!r} and is now {new!r}",
            remedy=f"give another output_dir, or set {key} back",
        )
    return True


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of all that the same run may not change; None for a key that is not there."""
    if isinstance(old, Section) and isinstance(new, Section):
        fields = type(new).model_fields.items()
        pairs = {name: (getattr(old, name), getattr(new, name)) for name, f in fields if MAY_CHANGE not in f.metadata}
    elif isinstance(old, dict) and isinstance(new, dict):
        pairs = {name: (old.get(name), new.get(name)) for name in old | new}
    else:
        if old != new:
            yield key, old, new
        return
    for name, (before, now) in pairs.items():
        yield from _differences(before, now, f"{key}.{name}" if key else name)
