"""Shares a step's prompts out over the engines, and gathers their rollouts on every rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Replica:
    """The engine that this rank is part of; vLLM's tensor-parallel groups are consecutive ranks.

    index:       of this rank's engine, from 0
    count:       how many engines the job has
    tensor_rank: this rank's place within its engine
    """

    index: int
    count: int
    tensor_rank: int

    @classmethod
    def current(cls, tensor_parallel: int) -> "Replica":
        """This rank's, from torch.distributed. `config.preflight` has checked that the world size divides."""
        if not torch.distributed.is_initialized():
            return cls(0, 1, 0)
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls(rank // tensor_parallel, world // tensor_parallel, rank % tensor_parallel)

    @property
    def is_leader(self) -> bool:
        """Whether this rank acts for its replica: it judges the replica's captions and contributes to `gather`."""
        return self.tensor_rank == 0

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This replica's share: every `count`-th item, so that prompts of one length in a row spread over replicas."""
        return list(items[self.index :: self.count])

    def gather(self, mine: Sequence[Result]) -> list[Result]:
        """The results of all replicas, in the order of the step's prompts, on every rank. A collective.

        mine: this replica's results in the order of `shard(prompts)`; other ranks than the leader may pass anything.
              They are pickled, so keep them small: token ids, logprobs and text, no pixels.
        """
        if not torch.distributed.is_initialized():
            return list(mine)
        shares: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, list(mine) if self.is_leader else None)
        by_replica = [share for share in shares if share is not None]
        total = sum(map(len, by_replica))
        return [by_replica[place % self.count][place // self.count] for place in range(total)]
