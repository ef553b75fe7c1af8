"""vLLM in a process that the trainer owns: settings that it reads at import, and state that it must leave as it was."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import numpy
import torch

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its steps and weights are ours to drive
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay as the launcher placed them
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it knows no seeds, and would be compiled, or missed, for profiling alone
}


def import_vllm() -> ModuleType:
    """Import vLLM (several seconds, so on first use and not with this package) with the settings above.

    Variables that the user has set win, except the first, without which the engine would live in another process.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # The sampler's one compiled helper, a comparison and a sum, would cost ten seconds of C++ compilation.
        type(current_platform).simple_compile_backend = "eager"
        _use_gloo_instead_of_shared_memory()
    return vllm


def _use_gloo_instead_of_shared_memory() -> None:
    """Keep tensor-parallel engines on a CPU from meeting in shared memory, as vLLM would have them do.

    Every engine under an external launcher gives that memory one and the same name: two jobs on a machine collide, and
    a killed job leaves it behind for the next to fail on. Where ranks disagree on the name vLLM turns to the process
    group, which is as fast for models that a CPU can train, and does not spin.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    _CPUSHMDistributed.make_group_name = staticmethod(lambda communicator: str(os.getpid()))
    # Of no use where each rank drives its own engine, and left behind at the end of every run, with a warning.
    setattr(MessageQueue, "create_from_process_group", staticmethod(lambda *arguments, **options: None))  # noqa: B010


@contextmanager
def process_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever vLLM draws or seeds inside, Python's, NumPy's and torch's random generators are as before on leaving.

    `torch.set_num_threads` too: vLLM's CPU worker replaces it with a function that does nothing. And the CUDA stream.
    """
    python_state, numpy_state, set_num_threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _stream_kept(device) if devices else nullcontext():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads


@contextmanager
def _stream_kept(device: torch.device) -> Iterator[None]:
    """vLLM's first tensor-parallel collective makes a stream of its own the process's current one, and leaves it so.

    The learner's parameters, buffers and gradient accumulators belong to the one before.
    """
    stream = torch.cuda.current_stream(device)
    try:
        yield
    finally:
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)  # vLLM's own, which takes note of it
