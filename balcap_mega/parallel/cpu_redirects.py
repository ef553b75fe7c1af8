"""Megatron-Core on a CPU: where its code says "cuda", this module answers "cpu", for as long as a `with` lasts.

Megatron-Core has no CPU path, yet almost everything in it is plain PyTorch over a process group, which gloo serves as
well as NCCL. What remains is redirected here, and only inside `cpu_redirects()`, so that whatever else lives in the
process (a vLLM engine above all) sees an untouched `torch`:

- functions of `torch.cuda` that Megatron calls directly: the current device, random state, synchronisation, streams;
- Megatron's own accessors of the CUDA generator (`tensor_parallel/random.py`), which go to the CPU generator;
- literal `device="cuda"` arguments, `Tensor.cuda()`, and the checks on `Tensor.type()` in its optimizer: a
  `TorchFunctionMode` rewrites these, which Python drops when the `with` ends.

A CUDA run never enters this module.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _NoStream:
    """A stream or an event of a device that runs everything in order: every method returns at once."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return self

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass


def _nothing(*args, **kwargs) -> None:
    pass


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


REPLACEMENTS: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: CPU),
    (torch.cuda, "get_rng_state", _get_rng_state),
    (torch.cuda, "set_rng_state", _set_rng_state),
    (torch.cuda, "manual_seed", lambda seed: torch.manual_seed(seed)),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "empty_cache", _nothing),
    (torch.cuda, "Stream", _NoStream),
    (torch.cuda, "Event", _NoStream),
    (torch.cuda, "stream", lambda stream: nullcontext()),
    (torch.cuda, "current_stream", lambda device=None: _NoStream()),
    (torch.cuda, "default_stream", lambda device=None: _NoStream()),
    (torch.cuda.nvtx, "range_push", _nothing),
    (torch.cuda.nvtx, "range_pop", _nothing),
    (megatron_random, "_get_cuda_rng_state", _get_rng_state),
    (megatron_random, "_set_cuda_rng_state", _set_rng_state),
)


class _CudaMeansCpu(TorchFunctionMode):
    """Calls that name a CUDA device run on the CPU; float tensors answer to their CUDA type names."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + function(*args).rpartition(".")[2]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return function(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


@contextmanager
def cpu_redirects() -> Iterator[None]:
    """Run Megatron-Core code on the CPU inside this `with`; `torch` is exactly as before on leaving. Reentrant."""
    with ExitStack() as restore:
        for owner, name, replacement in REPLACEMENTS:
            restore.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        restore.enter_context(_CudaMeansCpu())
        yield
