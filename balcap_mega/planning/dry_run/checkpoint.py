"""What a checkpoint takes of the host's memory: the tensors that one rank copies there to write them."""

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)

from balcap_mega.parallel.platform import calls_megatron
from balcap_mega.planning.dry_run.device import DryDevice
from balcap_mega.training.checkpoint.format import sharded_state
from balcap_mega.training.learner import Learner


@calls_megatron
def save_dry(learner: Learner, device: DryDevice) -> int:
    """Bytes of this rank's copies, beside what is on the host already, such as the memory for the optimizer's state."""
    before = device.host.total
    with device.host.during("checkpoint"):
        state, _ = sharded_state(learner.model, learner.optimizer, is_loading=False)
        share = state.pop("share", {})  # of the distributed optimizer; data-parallel ranks have the rest alike
        apply_factories(state)
        group = parallel_state.get_data_parallel_group()
        if (shares := determine_main_replica_uniform_distribution(state, group)) is not None:
            distribute_main_replicas_with_precomputed_distribution(state, group, shares)
        written = [
            value.data.to("cpu")
            for value in (*nested_values(state), *share.values())
            if isinstance(value, ShardedTensor) and value.data is not None and is_main_replica(value.replica_id)
        ]
        small = sum(tensor.nbytes for tensor in written if not device.is_host_shape(tensor))
        peak = device.host.peaks["checkpoint"].total - before
    del state, share, written
    return peak + small
