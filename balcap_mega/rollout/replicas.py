"""A step's prompts shared out over the engines, and everybody's rollouts gathered again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Replica:
    """Which engine this rank is part of. vLLM's tensor-parallel groups are consecutive ranks."""

    index: int
    count: int
    tensor_rank: int

    @classmethod
    def current(cls, tensor_parallel: int) -> "Replica":
        """By torch.distributed's rank and world size; `config.preflight` has checked that the world divides."""
        if not torch.distributed.is_initialized():
            return cls(0, 1, 0)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls(rank // tensor_parallel, world // tensor_parallel, rank % tensor_parallel)

    @property
    def is_leader(self) -> bool:
        """Whether this rank acts for its replica: it judges the replica's captions and contributes to `gather`."""
        return self.tensor_rank == 0

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This replica's share: every `count`-th prompt, so that neighbours of like length spread over replicas."""
        return list(items[self.index :: self.count])

    def gather(self, mine: Sequence[Result]) -> list[Result]:
        """What all replicas made of a step's prompts, in the prompts' order, on every rank. A collective.

        mine: the replica's results in the order of `shard(prompts)`, of which only the leader's count. Keep them small
        (they are pickled): token ids, logprobs and text, no pixels.
        """
        if not torch.distributed.is_initialized():
            return list(mine)
        shares: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, list(mine) if self.is_leader else None)
        by_replica = [share for share in shares if share is not None]
        total = sum(map(len, by_replica))
        return [by_replica[place % self.count][place // self.count] for place in range(total)]
