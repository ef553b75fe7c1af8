"""Where a run's numbers go: metrics.jsonl, TensorBoard and, if set up, Weights & Biases; and a timer of phases."""

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from balcap_mega.errors import UserError
from balcap_mega.parallel.progress import progress

METRICS_FILE = "metrics.jsonl"
LATE_METRICS_FILE = "benchmarks.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Row(TypedDict):
    """A line of metrics.jsonl: the number of steps done, and a number under each of the other names."""

    __pydantic_config__ = ConfigDict(extra="allow")

    step: int


_ROW = TypeAdapter(Row)


class PhaseTimer:
    """`with phase("rollout"): ...` adds the block's wall time to `phase.seconds["rollout"]`, also if it raises.

    Inside, the process's `progress` is in that phase of `step`.
    On a CUDA `device` it also fills `phase.memory`, in GiB, with the largest seen of
        rollout_used:       of the whole device as the phase ends. PyTorch keeps what it has freed, so this is the
                            phase's peak, unless it returned memory to the driver
        rollout_allocated:  PyTorch's peak of live tensors; a sleeping engine's count as if they were there
        rollout_reserved:   PyTorch's peak with what it keeps
    """

    def __init__(self, device: torch.device | None = None, step: int | None = None) -> None:
        self.step = step
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.perf_counter()
        try:
            with progress.phase(name, self.step), torch.profiler.record_function(f"phase {name}"):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if self._device is not None:
                self._keep_memory(name)

    def _keep_memory(self, name: str) -> None:
        free, total = torch.cuda.mem_get_info(self._device)
        peaks = {
            "used": total - free,
            "allocated": torch.cuda.max_memory_allocated(self._device),
            "reserved": torch.cuda.max_memory_reserved(self._device),
        }
        for kind, value in peaks.items():
            key = f"{name}_{kind}"
            self.memory[key] = max(self.memory.get(key, 0.0), value / 2**30)


class MetricsLogger:
    """`log(step, metrics)` writes one step's numbers everywhere; use it as a context manager.

    first_step: the step (from 0) that comes next. What an earlier process wrote about it or later ones, after its last
        checkpoint, is dropped: the file then reads as if the run had never been interrupted.
    enabled: False on all ranks but the first, where nothing is opened or written.

    Weights & Biases is used when it is installed and one of WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE is set.
    """

    def __init__(self, folder: Path, first_step: int = 0, *, enabled: bool = True) -> None:
        self._path = folder / METRICS_FILE
        self._board = self._wandb = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one rank needs it

        for name in (METRICS_FILE, LATE_METRICS_FILE):
            _keep_steps(folder, name, first_step)
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=first_step + 1)
        self._wandb = _start_wandb(folder)

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log step `step` (from 0); everywhere it is written as the number of steps done, from 1."""
        if self._board is None:
            return
        done = step + 1
        # One write and one sync a line: a crash can cut off the last line only, which `read_metrics` leaves out.
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in metrics.items():
            self._board.add_scalar(name, value, done)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=done)

    def late(self, steps: int, metrics: Mapping[str, float]) -> None:
        """Log what is known only now about the weights after `steps` steps: a row of its own in benchmarks.jsonl."""
        if self._board is None:
            return
        with open(self._path.with_name(LATE_METRICS_FILE), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": steps, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, steps)
        if self._wandb is not None:  # whose own steps only go forward
            self._wandb.log({**metrics, "benchmark/step": steps})


def read_metrics(folder: Path, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, one a step, in order, or those of another file like it.

    A last line that a crash cut off is left out.

    Raises UserError naming a line that is damaged otherwise.
    """
    path = folder / name
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_ROW.validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = "".join(f"{part}: " for part in first["loc"])
            raise UserError(f"{path}:{number} is damaged: {key}{first['msg']}", remedy="remove that line") from error
    return rows


def _keep_steps(folder: Path, name: str, steps_done: int) -> None:
    path = folder / name
    if not path.exists() and name != METRICS_FILE:
        return
    rows = [row for row in read_metrics(folder, name) if row["step"] <= steps_done]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def _start_wandb(folder: Path) -> Any:
    """A Weights & Biases run named after the folder, gone on with when the folder's run is; None if not set up."""
    wanted = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"))
    if not wanted or importlib.util.find_spec("wandb") is None:
        return None
    import wandb  # pyright: ignore[reportMissingImports] (optional)

    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    return wandb.init(dir=str(folder), name=folder.name, id=identity.read_text(), resume="allow")
