"""From the host to the device without a wait: the host goes on to queue work while the device is still at the last."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, through pinned memory; the tensor itself where it is there already.

    Out of pageable memory CUDA copies only once all that was queued before is done, and the host waits for it.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def concatenated(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Tensors of the host one behind the other, in the dtype and on the device of `like`."""
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    host = torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
    for part, tensor in zip(host.split(list(map(len, tensors))), tensors, strict=True):
        part.copy_(tensor)
    return host.to(like.device, non_blocking=True)
