"""A second set of weights in host memory: the reference policy of the KL term."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from balcap_mega.parallel.host_memory import HostMemory


class OtherWeights:
    """A copy in host memory of `policy`'s trained weights, as they are on construction. Frozen ones are not copied.

    `in_place` swaps the two sets, at most `host_memory.BLOCK_BYTES` at a time, so there is never a third copy.
    """

    def __init__(self, policy: nn.Module):
        self._policy = policy
        self._host = HostMemory(next(policy.parameters()).device)
        for host, weights in self._stretches():
            host.copy_(weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy has the copied weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for host, weights in self._stretches():
            current = weights.clone()
            weights.copy_(host, non_blocking=True)
            host.copy_(current, non_blocking=True)  # in the device's order: nobody else touches this memory

    def _stretches(self) -> Iterator[tuple[Tensor, Tensor]]:
        trained = (parameter.detach() for parameter in self._policy.parameters() if parameter.requires_grad)
        return self._host.beside(parameter.view(-1).view(torch.uint8) for parameter in trained)
