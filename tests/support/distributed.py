"""Run a function on several ranks of a real gloo process group, and hand its return values back."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import BaseContext
from typing import Any

import torch
import torch.multiprocessing as multiprocessing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_store() -> torch.distributed.TCPStore:
    """As torchrun has it: bound by the launcher before any rank is told its port, so that nobody else can take it."""
    return torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _rank_main(rank: int, world_size: int, port: int, target: Callable, args: tuple, results) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
        results.put((rank, target(*args), None))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))
        raise


def forking() -> BaseContext:
    """Starts processes by forking one that has imported what ranks need, and has started nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


def launch(world_size: int, target: Callable, *args: Any, timeout: float = 240) -> list[Any]:
    """Call the module-level function `target(*args)` on `world_size` ranks; return what each returned, by rank.

    Raises AssertionError with the first failing rank's traceback, or TimeoutError naming the silent ranks.
    Return plain Python values or numpy arrays: a tensor's shared memory would not outlive its process.
    """
    context = forking()
    results = context.Queue()
    store = launcher_store()
    ranks = [
        context.Process(target=_rank_main, args=(rank, world_size, store.port, target, args, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    values: dict[int, Any] = {}
    try:
        while len(values) < world_size:
            try:
                rank, value, error = results.get(timeout=timeout)
            except Exception:
                silent = sorted(set(range(world_size)) - set(values))
                raise TimeoutError(f"ranks {silent} returned nothing within {timeout} s") from None
            assert error is None, f"rank {rank} failed:\n{error}"
            values[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=10 if len(values) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [values[rank] for rank in range(world_size)]
