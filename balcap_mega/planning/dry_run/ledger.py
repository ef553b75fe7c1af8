"""Who holds how much of a device's memory, and when it was fullest: every storage that lives on it, by its kind."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

KINDS = ("weights", "gradients", "optimizer", "images", "head", "activations", "other")
"""Of what a learner allocates.

images:      pixels, the vision tower's activations and its embeddings
head:        what follows the last layer: its norm, the rows that predict, logits, their gradients
activations: what else passes over rows take, forward and backward
other:       what the steps between such passes hold
"""

BETWEEN = "between"
"""The moment that no other name is given to."""


@dataclass(frozen=True)
class Peak:
    """The fullest state of a moment.

    parts:   bytes then, by kind
    highest: the most bytes of each kind in that moment, at whatever time
    """

    parts: dict[str, int]
    highest: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class Ledger:
    """Bytes that are allocated, by kind, as PyTorch's allocator would have them.

    granularity: an allocation is rounded up to a multiple of so many bytes (CUDA's allocator: 512)
    peaks:       of every moment, in the order in which they began
    """

    granularity: int = 512
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    kind: str = "other"
    moment: str = BETWEEN
    total: int = 0
    peaks: dict[str, Peak] = field(default_factory=dict)
    _held: dict[int, tuple[weakref.ref, str, int]] = field(default_factory=dict)  # by the storage's address

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._hold(storage, key, self.kind)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """The storage was emptied or filled again."""
        _, kind, _ = self._held.get(storage._cdata, (None, self.kind, 0))
        self._drop(storage._cdata)
        self._hold(storage, storage._cdata, kind)

    def name(self, tensors: Iterable[Tensor], kind: str) -> None:
        """What these tensors hold is of that kind."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._drop(storage._cdata)
            self._hold(storage, storage._cdata, kind)

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        """What is allocated inside is of that kind."""
        outer, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = outer

    @contextmanager
    def during(self, moment: str) -> Iterator[None]:
        """The peak inside is that moment's; of several that go by its name, the highest."""
        outer, self.moment = self.moment, moment
        self._peak()
        try:
            yield
        finally:
            self.moment = outer

    def note(self, moment: str) -> None:
        """What is held now is that moment's."""
        with self.during(moment):
            pass

    def _hold(self, storage: torch.UntypedStorage, key: int, kind: str) -> None:
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self._held[key] = (weakref.ref(storage, lambda _: self._drop(key)), kind, size)
        self.parts[kind] += size
        self.total += size
        peak = self._peak()
        peak.highest[kind] = max(peak.highest[kind], self.parts[kind])

    def _drop(self, key: int) -> None:
        if key in self._held:
            _, kind, size = self._held.pop(key)
            self.parts[kind] -= size
            self.total -= size

    def _peak(self) -> Peak:
        peak = self.peaks.get(self.moment)
        if peak is None:
            peak = self.peaks[self.moment] = Peak(dict(self.parts), dict(self.parts))
        elif self.total > peak.total:
            peak.parts.update(self.parts)
        return peak
