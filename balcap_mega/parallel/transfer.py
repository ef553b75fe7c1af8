"""Copies from the host to the device that do not block the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied through pinned memory; the tensor itself if it is there already.

    A copy from pageable memory would block the host until the device has done all work queued before.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def concatenated(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Host tensors [n_i, ...] concatenated to [sum of n_i, ...], in the dtype and on the device of `like`."""
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    host = torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
    for part, tensor in zip(host.split(list(map(len, tensors))), tensors, strict=True):
        part.copy_(tensor)
    return host.to(like.device, non_blocking=True)
