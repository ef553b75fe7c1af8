"""FP8 in the decoder's linears: what each recipe asks of shapes and of the machine, and Megatron's options for it.

Embeddings, vision tower, attention and LM head stay in bfloat16; so do the first and the last layer, but for delayed
scaling, whose history is one for the whole model.
"""

from typing import Any

import torch
from packaging.version import Version

from balcap_mega.config.schema import ModelConfig, ParallelConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.layer_specs import transformer_engine_version

TILE = {"blockwise": 128, "tensorwise": 16, "delayed": 16}
"""Multiples that a recipe wants every side of a GEMM to be. Blockwise scales blocks of 128 x 128 of a weight."""

TRANSFORMER_ENGINE = (Version("2.9"), Version("2.12"))
"""What Megatron-Core 0.16.1 works with: from the first up to, not including, the second."""


def row_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """What the length of a packed row must be a multiple of: under sequence parallelism each rank quantises its part.

    128 for every recipe: it costs padding of 64 tokens a row on average, and GEMMs like whole tiles.
    """
    tile = TILE["blockwise"] if model.fp8 != "none" else 1
    return tile * parallel.tensor if parallel.sequence else tile


def fp8_options(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig."""
    if model.fp8 == "none":
        return {}
    history = {
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        # Reduced after every row. Data-parallel ranks may have different numbers of rows, and would wait for ever.
        "tp_only_amax_red": True,
    }
    return {
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe,
        "first_last_layers_bf16": model.fp8_recipe != "delayed",
        # Weights are quantised anew for every row, which costs under a hundredth of its GEMMs. Kept instead, they and
        # their transposes would take two bytes a parameter, also while the engine generates.
        "disable_parameter_transpose_cache": True,
        **(history if model.fp8_recipe == "delayed" else {}),
    }


def check_fp8(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse GEMMs that the recipe has no kernel for. Raises UserError, before anything is allocated."""
    if model.fp8 == "none":
        return
    tile = TILE[model.fp8_recipe]
    for name, size in _gemm_sizes(architecture, parallel.tensor).items():
        if size % tile:
            raise UserError(
                f"model.fp8={model.fp8} with fp8_recipe={model.fp8_recipe} needs multiples of {tile}, but {name} is "
                f"{size} at parallel.tensor={parallel.tensor}",
                remedy=_remedy(architecture, model, parallel),
            )


def check_fp8_machine(model: ModelConfig, device: torch.device) -> None:
    """Refuse a GPU, a CUDA or a Transformer Engine without the recipe. Raises UserError, before any allocation."""
    if model.fp8 == "none":
        return
    key = f"model.fp8={model.fp8} with fp8_recipe={model.fp8_recipe}"
    engine = transformer_engine_version()
    if engine is None:
        raise UserError(f"{key} needs Transformer Engine", remedy="pip install .[cuda], or set model.fp8=none")
    oldest, too_new = TRANSFORMER_ENGINE
    if not oldest <= engine < too_new:
        raise UserError(
            f"{key}: Megatron-Core 0.16.1 does not work with Transformer Engine {engine}",
            remedy=f"install transformer-engine>={oldest},<{too_new}",
        )
    blockwise = model.fp8_recipe == "blockwise"
    capability, needed = torch.cuda.get_device_capability(device), (9, 0) if blockwise else (8, 9)
    if capability < needed:
        raise UserError(
            f"{key} needs a GPU of compute capability {needed[0]}.{needed[1]}, this one has "
            f"{capability[0]}.{capability[1]}",
            remedy="set model.fp8=none",
        )
    if blockwise and Version(torch.version.cuda) < Version("12.9"):
        raise UserError(
            f"{key} needs CUDA 12.9, PyTorch here is built for {torch.version.cuda}",
            remedy="set model.fp8_recipe=tensorwise, or install a PyTorch for CUDA 12.9 or later",
        )


def _gemm_sizes(architecture: Architecture, tensor: int) -> dict[str, int]:
    """Sides of the decoder's weights on one tensor-parallel rank, in Hugging Face's terms."""
    heads, kv_heads = architecture.num_attention_heads, architecture.num_kv_heads
    head_dim = architecture.head_dim
    return {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size // tensor,
        "the width of all query heads": heads * head_dim // tensor,
        "the width of queries, keys and values": (heads + 2 * kv_heads) * head_dim // tensor,
    }


def _remedy(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> str:
    def fits(tile: int, tensor: int) -> bool:
        return not any(side % tile for side in _gemm_sizes(architecture, tensor).values())

    tile = TILE[model.fp8_recipe]
    smaller = [size for size in range(parallel.tensor - 1, 0, -1) if parallel.tensor % size == 0 and fits(tile, size)]
    remedies = [f"set parallel.tensor={smaller[0]}"] if smaller else []
    if fits(TILE["tensorwise"], parallel.tensor) and model.fp8_recipe == "blockwise":
        remedies.append("set model.fp8_recipe=tensorwise")
    return " or ".join([*remedies, "set model.fp8=none"])
