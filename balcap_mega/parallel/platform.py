"""Which device this process trains on, and what follows from that: backend, dtypes, how Megatron code is entered."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch

from balcap_mega.errors import UserError

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Platform:
    """`device` is this process's own; `backend` carries its collectives."""

    device: torch.device
    backend: Literal["gloo", "nccl"]

    @classmethod
    def resolve(cls, device: Literal["auto", "cpu", "cuda"]) -> "Platform":
        """The platform that `parallel.device` asks for; `auto` takes the GPU where there is one."""
        # One hardware queue: Megatron overlaps a layer's all-reduce with the next GEMM only if they start in order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # before CUDA is asked anything
        available = torch.cuda.is_available()
        if device == "cuda" and not available:
            raise UserError(
                "parallel.device=cuda but PyTorch sees no GPU", remedy="set parallel.device=cpu or check the driver"
            )
        if device == "cpu" or not available:
            return cls(torch.device("cpu"), "gloo")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        return cls(torch.device("cuda", local_rank), "nccl")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def dtype(self, name: Literal["float32", "bfloat16"]) -> torch.dtype:
        """The dtype of parameters and activations; master weights and main gradients are float32 on either platform."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

    def megatron(self) -> AbstractContextManager[None]:
        """Inside, Megatron-Core runs on the CPU if that is the device. Functions use `calls_megatron` instead."""
        return _redirects(self.backend)


def calls_megatron(function: Callable[P, Result]) -> Callable[P, Result]:
    """Decorator for functions that call Megatron-Core: inside, it is redirected to the CPU where that is the device.

    torch.distributed must be initialised: its backend says which device this process trains on.
    """

    @wraps(function)
    def redirected(*args: P.args, **kwargs: P.kwargs) -> Result:
        with _redirects(torch.distributed.get_backend()):
            return function(*args, **kwargs)

    return redirected


def _redirects(backend: str) -> AbstractContextManager[None]:
    if backend == "nccl":
        return nullcontext()
    from balcap_mega.parallel.cpu_redirects import cpu_redirects

    return cpu_redirects()
