"""Tables of the blocks that every rank holds on both sides of a refit: in Megatron's layout and in vLLM's."""

from collections.abc import Collection
from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.mapping import megatron_blocks, vllm_blocks
from balcap_mega.models.huggingface.table import Block
from balcap_mega.models.huggingface.tensors import vision_shapes
from balcap_mega.rollout.refit.transfers import Transfers, find_transfers


@dataclass(frozen=True)
class RefitTables:
    """The tables of all `world_size` ranks.

    Megatron numbers ranks with tensor parallelism fastest, then data, then pipeline; the ranks of
    one vLLM engine are consecutive.

    vision_data_parallel: vLLM keeps the vision tower whole on every rank
    transformer_engine:   Megatron's norms are parts of the linears behind them
    """

    architecture: Architecture
    world_size: int
    tensor_size: int
    pipeline_size: int
    engine_tensor_size: int
    vision_data_parallel: bool = False
    transformer_engine: bool = False

    def megatron_tables(self) -> list[list[Block]]:
        """Each rank's Megatron blocks; data-parallel copies share one list."""
        stage_ranks = self.world_size // self.pipeline_size
        shards = {
            (tensor_rank, pipeline_rank): megatron_blocks(
                self.architecture,
                tensor_rank=tensor_rank,
                tensor_size=self.tensor_size,
                pipeline_rank=pipeline_rank,
                pipeline_size=self.pipeline_size,
                transformer_engine=self.transformer_engine,
            )
            for tensor_rank in range(self.tensor_size)
            for pipeline_rank in range(self.pipeline_size)
        }
        return [shards[rank % self.tensor_size, rank // stage_ranks] for rank in range(self.world_size)]

    def engine_tables(self) -> list[list[Block]]:
        """Each rank's vLLM blocks; replicas share one list."""
        shards = [
            vllm_blocks(
                self.architecture,
                tensor_rank=tensor_rank,
                tensor_size=self.engine_tensor_size,
                vision_data_parallel=self.vision_data_parallel,
            )
            for tensor_rank in range(self.engine_tensor_size)
        ]
        return [shards[rank % self.engine_tensor_size] for rank in range(self.world_size)]

    def transfers(self, rank: int, *, bucket_elements: int, frozen: Collection[str] = ()) -> Transfers:
        """What `rank` sends, receives and copies in a refit of everything but the Hugging Face tensors `frozen`."""
        return find_transfers(
            self.megatron_tables(),
            self.engine_tables(),
            rank=rank,
            bucket_elements=bucket_elements,
            skip=frozenset(frozen),
        )


def vision_tensors(architecture: Architecture) -> frozenset[str]:
    """The Hugging Face tensors of the vision tower and projector: what `model.freeze_vision` freezes."""
    return frozenset(vision_shapes(architecture))
