"""Elements of the weights that one rank holds, read off the table that places them (`models.mapping`)."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.mapping import megatron_blocks, vllm_blocks
from balcap_mega.models.huggingface.table import Block


@dataclass(frozen=True)
class StageParameters:
    """Elements on one tensor-parallel rank of a pipeline stage; embedding and head are 0 where the stage has none."""

    vision: int
    embedding: int
    layers: int
    head: int

    @property
    def language(self) -> int:
        return self.embedding + self.layers + self.head

    @property
    def total(self) -> int:
        return self.vision + self.language


class ParameterCounts:
    """Counts of one architecture, computed once for each way to cut it."""

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.stages = lru_cache(self._stages)
        self.engine_parameters = lru_cache(self._engine_parameters)

    def _stages(self, tensor: int, pipeline: int) -> list[StageParameters]:
        """The counts of every pipeline stage of the policy; all tensor-parallel ranks of a stage hold equally many."""
        return [self._stage(tensor, pipeline, rank) for rank in range(pipeline)]

    def _stage(self, tensor: int, pipeline: int, rank: int) -> StageParameters:
        blocks = megatron_blocks(
            self.architecture, tensor_rank=0, tensor_size=tensor, pipeline_rank=rank, pipeline_size=pipeline
        )
        sizes = dict.fromkeys(("vision", "embedding", "decoder", "output_layer"), 0)
        for block in blocks:
            if "word_embeddings" not in block.parameter and "output_layer" not in block.parameter:
                sizes["vision" if block.parameter.startswith("vision.") else "decoder"] += _elements(block)
        vocabulary = self.architecture.padded_vocab_size(tensor) // tensor * self.architecture.hidden_size
        for name in ("embedding", "output_layer"):
            held = any(block.parameter.startswith(f"language_model.{name}.") for block in blocks)
            sizes[name] = vocabulary if held else 0
        return StageParameters(sizes["vision"], sizes["embedding"], sizes["decoder"], sizes["output_layer"])

    def engine(self, tensor: int) -> int:
        """Elements on one rank of a vLLM engine."""
        return sum(self.engine_parameters(tensor))

    def _engine_parameters(self, tensor: int) -> tuple[int, ...]:
        """The same for each of vLLM's fused parameters."""
        whole_vision = self.architecture.family.vision_data_parallel and tensor > 1
        blocks = vllm_blocks(self.architecture, tensor_rank=0, tensor_size=tensor, vision_data_parallel=whole_vision)
        sizes: Counter[str] = Counter()
        for block in blocks:
            sizes[block.parameter] += _elements(block)
        return tuple(sizes.values())


def _elements(block: Block) -> int:
    return math.prod(stop - start for start, stop in (block.rows, block.cols))
