"""What this package relies on of vLLM's insides, apart from its layers (`refit.weight_transfer`).

Settings that vLLM reads at import, registries, finalizers, and what it must leave alone in the trainer's process.
"""

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


def register_weight_transfer(name: str, module: str, engine_class: str) -> None:
    """Let `weight_transfer_config` name our backend. vLLM has no way to ask whether that was done before."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, engine_class)


def build_engine(arguments):
    """An engine with vLLM's defaults for offline use: on an H100 1,024 captions at once, where a bare one takes 128.

    The trainer owns torch.distributed: an engine that is garbage-collected must not shut it down.
    """
    from vllm import LLMEngine
    from vllm.usage.usage_lib import UsageContext

    engine = LLMEngine.from_engine_args(arguments, UsageContext.LLM_CLASS)
    # vLLM 0.24, which the hosts of GPU benchmarks may have, has no finalizer.
    if finalizer := getattr(engine.engine_core, "_finalizer", None):
        finalizer.detach()
    return engine


def end_engine(engine) -> None:
    """vLLM's own end, for which `build_engine` left it no occasion. It takes torch.distributed with it."""
    engine.engine_core.engine_core.shutdown()


def scale_logits(engine, scale: float) -> None:
    """Have the model multiply its logits by `scale`, so that raw logprobs are those of the tempered distribution.

    In float32, as the trainer does. vLLM's own `scale` rounds each product to the dtype of the weights: in bfloat16 a
    logit of 30 by up to 0.06, and its logprob with it.
    """
    if scale == 1:
        return

    def scaled(processor: torch.nn.Module, arguments: tuple, logits: torch.Tensor | None) -> torch.Tensor | None:
        return None if logits is None else logits.float().mul_(scale)  # None: as it was

    def register(model: torch.nn.Module) -> None:
        model.get_language_model().logits_processor.register_forward_hook(scaled)

    engine.apply_model(register)


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
    MessageQueue.create_from_process_group = staticmethod(lambda *arguments, **options: None)


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
