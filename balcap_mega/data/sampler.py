"""Which records a step trains on."""

from functools import lru_cache

import numpy as np


class RecordSampler:
    """Shuffled epochs cut into batches, without state: step t's batch is a pure function of (seed, t).

    A run resumes by asking for the next step, and every data-parallel rank computes every other rank's share. The
    stream of records does not depend on the number of ranks. A batch may end one epoch and begin the next.
    """

    def __init__(self, size: int, seed: int, batch_size: int):
        if size < 1 or batch_size < 1:
            raise ValueError(f"size {size} and batch_size {batch_size} must be positive")
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def indices(self, step: int) -> list[int]:
        """`batch_size` indices in [0, size) for step 0, 1, …"""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._epoch(position // self.size)[position % self.size]) for position in positions]

    def shard(self, step: int, rank: int, world_size: int) -> list[int]:
        """Rank `rank`'s equal, contiguous share of the step's batch; `world_size` must divide the batch."""
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(f"no share of {self.batch_size} prompts for rank {rank} of {world_size}")
        share = self.batch_size // world_size
        return self.indices(step)[rank * share : (rank + 1) * share]

    def _shuffled(self, epoch: int) -> np.ndarray:
        # RandomState's streams are frozen across NumPy versions; Generator's are not.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.size)
