"""Process groups: torch.distributed and Megatron's parallel state, set up once a run from `ParallelConfig`."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from balcap_mega.config.preflight import data_parallel_size
from balcap_mega.config.schema import ParallelConfig
from balcap_mega.parallel.platform import Platform, calls_megatron
from balcap_mega.parallel.rendezvous import job_store


@dataclass(frozen=True)
class ProcessGrid:
    """This rank's place in the tensor x pipeline x data grid, and the grid's extent."""

    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def world_size() -> int:
    """Ranks of this job, known before torch.distributed is: torchrun says so, and a bare `python` is one."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize_parallel(
    config: ParallelConfig, platform: Platform, seed: int = 0, *, timeout_seconds: float | None = None
) -> ProcessGrid:
    """Start torch.distributed (unless it runs already), Megatron's groups and its random generators.

    `timeout_seconds` (`config.timeout_seconds` unless given) bounds every collective.
    Raises UserError when the world does not fit the layout, before any process waits for another.
    """
    data_parallel_size(config, world_size())
    timeout_seconds = timeout_seconds or config.timeout_seconds
    timeout = timedelta(seconds=timeout_seconds)
    if not torch.distributed.is_initialized():
        if "RANK" in os.environ:
            store, rank, world = job_store(timeout)
        else:  # a bare `python`, without torchrun
            store, rank, world = torch.distributed.HashStore(), 0, 1
        torch.distributed.init_process_group(
            platform.backend, store=store, rank=rank, world_size=world, timeout=timeout
        )
    _initialize_megatron(config, seed, timeout_seconds)
    return process_grid()


@calls_megatron
def _initialize_megatron(config: ParallelConfig, seed: int, timeout_seconds: float) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    model_parallel_cuda_manual_seed(seed)


def tensor_group() -> ProcessGroup:
    """This rank's tensor-parallel group, which Megatron's annotations leave open."""
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, ProcessGroup)
    return group


def process_grid() -> ProcessGrid:
    """This rank's place, as Megatron's parallel state has it."""
    return ProcessGrid(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def end_parallel() -> None:
    """The end of a process's work with others, on all ranks at once: one that left early would look like a failure."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        destroy_parallel()
        torch.distributed.destroy_process_group()


def destroy_parallel() -> None:
    """Drop Megatron's groups, so that another layout can be set up in the same processes; torch.distributed stays."""
    parallel_state.destroy_model_parallel()
