"""Checkpoints to resume a run from: weights, optimizer, random generators and counters, at any later layout.

`writer` writes them; here is their format, and how one is found, verified and loaded.

    <folder>/latest                       the name of the checkpoint to resume from
    <folder>/step_000123/manifest.json    step, layout, the caller's extra values; size and SHA-256 of every file
    <folder>/step_000123/megatron/        weights and optimizer: Megatron's distributed format
    <folder>/step_000123/captions.json    captions sampled ahead, where there are any: see `in_flight`
    <folder>/step_000123/random/          each rank's generators; taken up only at the layout that saved them

A checkpoint is written as `step_000123.tmp` and renamed when it is whole. It is verified before it is read.

Of what is read, Megatron's part holds pickles; `checkpoint_pickles.py` looks into each before Megatron does. Everything
else is JSON and safetensors.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from balcap_mega.errors import UserError
from balcap_mega.parallel.groups import process_grid
from balcap_mega.parallel.platform import calls_megatron
from balcap_mega.training.checkpoint.optimizer_state import OptimizerShare
from balcap_mega.training.checkpoint.pickles import foreign_content
from balcap_mega.training.checkpoint.random_state import load_random_state

logger = logging.getLogger(__name__)

LATEST = "latest"
MANIFEST = "manifest.json"
# Optimizer state in the shapes of the parameters: what may be read at another tensor or pipeline size.
CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest older one if that is not whole; None without any.

    Whole means that every file is there in the size that the manifest states.
    """
    marker = folder / LATEST
    if not marker.is_file():
        return None
    newest = marker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step_\d+", newest):
        raise UserError(
            f"{marker} names no checkpoint: {newest[:80]!r}",
            remedy="write the name of the newest step_... folder beside it there, or give another output_dir",
        )
    for path in step_folders(folder, newest):
        damage = _damage(path)
        if damage is None:
            return path
        logger.warning("checkpoint %s is passed over: %s", path, damage)
    return None


@calls_megatron
def load_checkpoint(path: Path, model: DistributedDataParallel, optimizer: ChainedOptimizer) -> dict[str, Any]:
    """Restore what `CheckpointWriter` wrote at this or any other layout; return its `extra`. A collective.

    At the same layout everything that follows is bit for bit as without the interruption; at another one random
    generators stay as they are. Raises UserError, on all ranks, for a damaged checkpoint or one of another model.
    """
    _verify(path)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    _allocate_state(optimizer)
    state, share = sharded_state(model, optimizer, is_loading=True)
    with _naming(path):
        loaded = dist_checkpointing.load(state, str(path / "megatron"), strict=StrictHandling.RAISE_ALL)
        model.module.load_state_dict(loaded["model"])
        _load_optimizer(optimizer, loaded["optimizer"], share)
        if manifest["layout"] == layout_sizes():
            load_random_state(path / "random" / f"rank_{torch.distributed.get_rank():05d}.safetensors")
    return manifest["extra"]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Files that are as the manifest has them may be another model's, or not go together: all of it may be forged.

    What comes of another rank that is gone (RuntimeError) is no damage, and is left alone.
    """
    try:
        yield
    except CheckpointingException as error:
        raise UserError(
            f"checkpoint {path} is of another model, or was trained with other weights frozen ({str(error)[:500]})",
            remedy="resume with the run's own config.yaml, or choose another output_dir",
        ) from error
    except (CheckpointException, SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        # torch gathers what its planner and reader met, on all ranks.
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise _damaged(path, f"its parts do not go together ({type(first).__name__}: {first})") from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"checkpoint {path} is damaged: {what}", remedy="delete it to resume from an older one")


def sharded_state(
    model: DistributedDataParallel, optimizer: ChainedOptimizer, *, is_loading: bool
) -> tuple[dict[str, Any], OptimizerShare | None]:
    """Weights and optimizer as Megatron saves and loads them; the share of it, where the optimizer is distributed."""
    metadata = dict(CONTENT)  # Megatron adds this layout's groups to it
    weights = model.module.sharded_state_dict(metadata=metadata)
    [part] = optimizer.chained_optimizers
    if isinstance(part, DistributedOptimizer):
        share = OptimizerShare.of(part, weights)
        return {"model": weights, "optimizer": part.state_dict(), "share": share.sharded}, share
    whole = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": whole}, None


def _allocate_state(optimizer: ChainedOptimizer) -> None:
    """Before its first step an optimizer has no state to load into."""
    [part] = optimizer.chained_optimizers
    if part.optimizer.state:
        return
    if isinstance(part.optimizer, torch.optim.AdamW):
        part.init_state_fn(part.optimizer, part.config)
        for state in part.optimizer.state.values():
            state["step"] = torch.tensor(0.0)
    elif isinstance(part, DistributedOptimizer):  # Transformer Engine's
        part.load_state_dict(part.state_dict())


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[str, Any], share: OptimizerShare | None) -> None:
    """Megatron's `load_state_dict`, correct for PyTorch's AdamW too.

    Megatron gives all its parameters one and the same `step` tensor, which each would then count up.
    """
    [part] = optimizer.chained_optimizers
    part.load_state_dict(state)
    for values in part.optimizer.state.values():
        if "step" in values:
            values["step"] = values["step"].clone()
    if share is not None:
        share.restore(part)


def layout_sizes() -> dict[str, int]:
    """The layout as the manifest states it."""
    grid = process_grid()
    return {"tensor": grid.tensor_size, "pipeline": grid.pipeline_size, "data": grid.data_size}


def step_folders(folder: Path, newest: str) -> list[Path]:
    """The checkpoints in `folder` up to the one of that name, newest first; not those that are still being written."""
    steps = {_step(path.name): path for path in folder.glob("step_*") if path.suffix != ".tmp" and path.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True) if step <= _step(newest)]


def _step(name: str) -> int:
    return int(name.removeprefix("step_"))


def file_digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest states them."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files at a glance: their presence and sizes."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sizes = {name: digest["bytes"] for name, digest in manifest["files"].items()}
        whole = isinstance(manifest["step"], int) and isinstance(manifest["extra"], dict) and "layout" in manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        return f"{MANIFEST} is missing or unreadable"
    for name, size in sizes.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{MANIFEST} names {name!r}, outside the checkpoint"
        if not os.path.isfile(path / name):
            return f"{name!r} is missing"
        if (found := os.path.getsize(path / name)) != size:
            return f"{name!r} has {found} bytes instead of {size!r}"
    return None


def _verify(path: Path) -> None:
    """Compare every file with its digest, each rank a share of them, and look into the pickles. A collective."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    damage = _damage(path)
    if damage is None:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        changed = [name for name in sorted(files)[rank::world] if file_digest(path / name) != files[name]]
        damage = f"{changed[0]} is not as it was written" if changed else foreign_content(path / "megatron")
    reports: list[str | None] = [None] * world
    torch.distributed.all_gather_object(reports, damage)
    for report in reports:
        if report is not None:
            raise _damaged(path, report)
