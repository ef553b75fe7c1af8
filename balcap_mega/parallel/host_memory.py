"""Host memory that holds a copy of device tensors."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**28
"""PyTorch rounds pinned allocations up to a power of two: this is one, so no more than a block is lost to it."""


class HostMemory:
    """Blocks in the host's memory, pinned where `device` is a GPU; they are allocated once and kept."""

    def __init__(self, device: torch.device):
        self._device = device
        self._blocks: list[Tensor] = []

    def beside(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views of equal length, (in host memory, in one of `tensors`), in order: copy either way.

        tensors: each [n] uint8. They take up the host memory one after another, from its start, as it grows to fit.
        """
        at = 0
        for tensor in tensors:
            done, size = 0, len(tensor)
            while done < size:
                block, start = divmod(at, BLOCK_BYTES)
                if block == len(self._blocks):
                    pinned = self._device.type == "cuda"
                    self._blocks.append(torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=pinned))
                length = min(size - done, BLOCK_BYTES - start)
                yield self._blocks[block][start : start + length], tensor[done : done + length]
                done, at = done + length, at + length
