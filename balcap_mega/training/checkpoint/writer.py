"""Checkpoints written while training goes on: a snapshot, its files from a thread, published once every rank has them.

Megatron plans the save and stages it (`async_sharded_save`); its own callers would then fork this process, with a
vLLM engine and CUDA contexts in it. Writing leaves Python's lock alone, so a thread serves as well. Format and loading
are those of `checkpoint`.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from balcap_mega.errors import UserError
from balcap_mega.parallel.agreement import all_ranks
from balcap_mega.parallel.platform import Platform, calls_megatron
from balcap_mega.parallel.progress import progress
from balcap_mega.training.checkpoint.format import (
    CONTENT,
    LATEST,
    MANIFEST,
    file_digest,
    layout_sizes,
    sharded_state,
    step_folders,
)
from balcap_mega.training.checkpoint.random_state import save_random_state
from balcap_mega.training.checkpoint.snapshot import snapshot, write
from balcap_mega.training.folder import sync_folder, write_json, write_text

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class _Save:
    """A checkpoint on its way: `written` ends with the digests of this rank's files, by name."""

    step: int
    extra: Mapping[str, Any]
    request: AsyncRequest
    written: Future[dict[str, Any]]


class CheckpointWriter:
    """Writes checkpoints to `folder`, one at a time, and keeps the `keep` newest. Every method is a collective.

    timeout_seconds: how long `finish` waits for the files of all ranks
    last:            the step of the newest published checkpoint, 0 before there is one: that is where a run begins
    """

    def __init__(self, folder: Path, platform: Platform, *, keep: int, timeout_seconds: float, last: int = 0):
        self.folder, self.keep, self.timeout_seconds, self.last = folder, keep, timeout_seconds, last
        self._platform = platform
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Save | None = None

    @calls_megatron
    def start(
        self,
        step: int,
        model: DistributedDataParallel,
        optimizer: ChainedOptimizer,
        extra: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """Take a snapshot of this very moment and return; its files are written from a thread.

        `extra` is anything JSON can hold, the same on all ranks; `files` are more files of the checkpoint by name, of
        which the first rank's count. Host memory until it is published: the weights of a tensor x pipeline shard, and
        12 bytes for each trained parameter of it, shared out over its data-parallel ranks. An earlier checkpoint that
        is still on its way is waited for; one of this step is not written again.
        """
        self.finish()
        if step <= self.last:
            return
        partial = self._partial(step)
        with self._naming(step):
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "megatron").mkdir(parents=True)
                (partial / "random").mkdir()
            torch.distributed.barrier()
            own_files = [partial / "random" / f"rank_{torch.distributed.get_rank():05d}.safetensors"]
            save_random_state(own_files[0])
            if torch.distributed.get_rank() == 0:
                own_files.append(partial / "megatron" / "common.pt")
                for name, content in files.items():
                    own_files.append(partial / name)
                    own_files[-1].write_bytes(content)
            filesystem_async._results_queue = SimpleQueue()  # else Megatron starts a process to hold its results
            state, _ = sharded_state(model, optimizer, is_loading=False)
            request = dist_checkpointing.save(
                state,
                str(partial / "megatron"),
                # What data-parallel ranks have alike is shared out over them.
                FullyParallelSaveStrategyWrapper(
                    TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                    parallel_state.get_data_parallel_group(),
                ),
                validate_access_integrity=False,  # the strategy asks all ranks for it anyway
                async_sharded_save=True,
                content_metadata=dict(CONTENT),
            )
            buckets = snapshot(request, model, optimizer)
        written = self._thread.submit(write, request, buckets, own_files, partial)
        self._pending = _Save(step, dict(extra), request, written)

    def poll(self) -> None:
        """Publish the checkpoint on its way if every rank has written its files. Raises UserError if one could not."""
        save = self._pending
        if save is not None and all_ranks(save.written.done(), self._platform.device):
            self._pending = None
            self._publish(save)

    def finish(self) -> None:
        """Wait for the checkpoint on its way, if there is one."""
        deadline = time.monotonic() + self.timeout_seconds
        while self._pending is not None:
            self.poll()
            progress.mark()  # a slow disk is no standstill: this wait has a limit of its own
            if self._pending is not None and time.monotonic() > deadline:
                state = "has written its files" if self._pending.written.done() else "is still writing its files"
                raise TimeoutError(
                    f"checkpoint.timeout_seconds={self.timeout_seconds} passed and the checkpoint of step "
                    f"{self._pending.step} is not whole; this rank {state}"
                )
            time.sleep(POLL_SECONDS)

    @calls_megatron
    def _publish(self, save: _Save) -> None:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        failure = save.written.exception()
        reports: list[Any] = [None] * world
        torch.distributed.all_gather_object(reports, save.written.result() if failure is None else str(_first(failure)))
        for number, report in enumerate(reports):
            if isinstance(report, str):
                raise self._failed(save.step, f"rank {number}: {report}")
        with self._naming(save.step):
            for finalize in save.request.finalize_fns:
                finalize()
            if rank == 0:
                files = {name: digest for report in reports for name, digest in report.items()}
                self._rename(save, files)
        torch.distributed.barrier()
        self.last = save.step

    def _rename(self, save: _Save, files: dict[str, Any]) -> None:
        partial, final = self._partial(save.step), self.folder / f"step_{save.step:06d}"
        for name in ("megatron/.metadata", "megatron/metadata.json"):  # which Megatron writes last, on this rank
            files[name] = file_digest(partial / name)
        manifest = {"step": save.step, "layout": layout_sizes(), "extra": save.extra, "files": files}
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # one that was found damaged
        os.rename(partial, final)
        sync_folder(self.folder)
        write_text(self.folder / LATEST, final.name + "\n")
        self._prune(final.name)

    def _prune(self, newest: str) -> None:
        """Delete all but the `keep` newest checkpoints up to `newest`, and what crashes left half done."""
        kept = step_folders(self.folder, newest)[: self.keep]
        for path in self.folder.glob("step_*"):
            if path not in kept:
                shutil.rmtree(path)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.tmp"

    @contextmanager
    def _naming(self, step: int) -> Iterator[None]:
        """What the disk refuses on one rank while all are busy with a checkpoint ends the run as a failed write."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError
            raise self._failed(step, str(_first(error))) from error

    def _failed(self, step: int, reason: str) -> UserError:
        """Make room again, and say what happened."""
        shutil.rmtree(self._partial(step), ignore_errors=True)
        since = f"step {self.last}" if self.last else "the beginning"
        return UserError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason}",
            remedy=f"make room there and start the same command again, it goes on from {since}",
        )


def _first(error: BaseException) -> BaseException:
    """What went wrong before all else: torch.save answers a full disk with a complaint of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error
