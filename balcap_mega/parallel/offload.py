"""The optimizer's state moves to the host between updates, which frees device memory, and comes back bit for bit.

Megatron-Core 0.16's own `MegatronOptimizer.offload_to_cpu` replaces tensors by copies. That breaks the link between a
float32 parameter and its shard in the optimizer, which share memory, and brings the step counter of PyTorch's AdamW
back on the wrong device. Here storages are emptied and filled again, so every tensor and view of them stays what it is.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from balcap_mega.config.schema import ParallelConfig
from balcap_mega.parallel.host_memory import HostMemory
from balcap_mega.parallel.platform import Platform, calls_megatron


def shares_device(config: ParallelConfig, platform: Platform) -> bool:
    """Whether the learner's state is offloaded while the engine runs, as `parallel.offload` says."""
    return platform.is_cuda if config.offload == "auto" else config.offload == "always"


class OptimizerOffload:
    """Gradient buffers, float32 weights and moments of one optimizer, on the device or in host memory.

    Gradients are dropped, since every step begins by zeroing them. Float32 weights and moments are copied to host
    memory, which is allocated once and kept, pinned where the device is a GPU. The policy's own weights stay on the
    device, since the refit reads them there.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: MegatronOptimizer, device: torch.device):
        self._model, self._optimizer, self._device = model, optimizer, device
        self._host = HostMemory(device)
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # what was emptied, and its bytes
        self.is_offloaded = False

    @calls_megatron
    def offload(self) -> None:
        """Copy the state to the host and free its device memory. Does nothing when it is offloaded."""
        if self.is_offloaded:
            return
        self._away = [(storage, storage.nbytes()) for storage in self._storages()]
        for host, on_device in self._pairs():
            host.copy_(on_device, non_blocking=True)
        self._synchronize()
        for storage, _ in self._away:
            storage.resize_(0)
        self._model.offload_grad_buffers()  # and empties PyTorch's cache: the engine allocates past it
        self.is_offloaded = True

    @calls_megatron
    def onload(self) -> None:
        """Copy the state back to the device, gradients as zeros. Does nothing when it is there."""
        if not self.is_offloaded:
            return
        self._model.restore_grad_buffers()
        for storage, size in self._away:
            storage.resize_(size)
        for host, on_device in self._pairs():
            on_device.copy_(host, non_blocking=True)
        self._synchronize()
        self._away = []
        self.is_offloaded = False

    @property
    def host_bytes(self) -> int:
        """Bytes of float32 weights and moments in host memory; 0 while they are on the device."""
        return sum(size for _, size in self._away)

    def _storages(self) -> list[torch.UntypedStorage]:
        """Of all the optimizer's tensors on the device, each once, but for those of the model's own parameters."""
        parts = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        inner = [part.optimizer for part in parts if part.optimizer is not None]
        tensors = chain.from_iterable(
            [*(p for group in optimizer.param_groups for p in group["params"]), *_tensors(optimizer.state)]
            for optimizer in inner
        )
        kept = {StorageWeakRef(parameter.untyped_storage()) for parameter in self._model.parameters()}
        found = {
            StorageWeakRef(tensor.untyped_storage()): tensor.untyped_storage()
            for tensor in tensors
            if tensor.device == self._device and tensor.numel()
        }
        return [storage for identity, storage in found.items() if identity not in kept]

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of uint8 views of equal length: (in host memory, on the device)."""
        return self._host.beside(
            torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage) for storage, _ in self._away
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _tensors(state: dict) -> Iterable[Tensor]:
    return (value for of_parameter in state.values() for value in of_parameter.values() if isinstance(value, Tensor))
