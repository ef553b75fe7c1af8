"""`profile.steps`: what a rank does in a few steps, for chrome://tracing, Perfetto and pytorch.org/memory_viz."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from balcap_mega.parallel.progress import progress

log = logging.getLogger(__name__)

MEMORY_EVENTS = 200_000
"""Allocations and releases that a snapshot goes back; about 100 MB."""


@contextmanager
def profiled(folder: Path, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Inside, this rank is profiled; on leaving, also by an error, its files stand in `folder`.

    step_000005_rank_0000.json.gz: PyTorch's trace, of the CPU and of a CUDA `device`, with the phases of the step
    step_000005_rank_0000.pickle:  every allocation on a CUDA device, and where in the code it was made

    A step is slower for it, and computes the same. What fails here is logged; it ends no step.
    """
    name = folder / f"step_{step:06d}_rank_{rank:04d}"
    cuda = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
    with _logged("starting"):
        folder.mkdir(parents=True, exist_ok=True)
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        profiler.start()
    try:
        yield
    finally:
        with progress.phase("profile", step - 1):  # a large trace takes a while, which others wait for in the next step
            with _logged("writing"):
                profiler.stop()
                _write(name, ".json.gz", profiler.export_chrome_trace)
            if cuda:
                with _logged("writing the memory snapshot of"):
                    _write(name, ".pickle", torch.cuda.memory._dump_snapshot)
                with _logged("ending"):
                    torch.cuda.memory._record_memory_history(enabled=None)


def _write(name: Path, suffix: str, write: Callable[[str], object]) -> None:
    """`write` into a file that has its name once it is whole."""
    partial = name.with_name(f"{name.name}.partial{suffix}")  # by whose end PyTorch knows whether to compress
    try:
        write(str(partial))
        partial.replace(name.with_name(name.name + suffix))
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.warning("%s a profile failed; the step goes on without it", what, exc_info=True)
