"""Prompts shared out over engines and rollouts gathered from them, over gloo, without engines."""

import pytest

from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from tests.support.distributed import launch


def exchange_rollouts(tensor_parallel):
    replica = Replica.current(tensor_parallel)
    gathered = []
    for prompts in (range(7), range(1)):
        rollouts = {n: (Rollout((n,), (-0.5,), str(n), True),) for n in prompts}
        mine = [RolloutGroup(n, (n,), rollouts[n], SeenRecord(n, "", "", "")) for n in replica.shard(prompts)]
        gathered.append([group.place for group in replica.gather(mine)])
    return gathered


@pytest.mark.parametrize("world,tensor_parallel", [(2, 1), (4, 2)])
def test_every_rank_gets_all_rollouts_in_order(world, tensor_parallel):
    assert launch(world, exchange_rollouts, tensor_parallel) == [[[*range(7)], [0]]] * world
