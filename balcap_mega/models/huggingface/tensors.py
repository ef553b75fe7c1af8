"""The tensors of a checkpoint in the Hugging Face layout: their names and shapes, by configuration alone.

Names are those of the released checkpoints (Qwen/Qwen2.5-VL-7B-Instruct, llava-hf/llava-1.5-7b-hf), which transformers
and vLLM both load; `canonical_name` translates what else versions of transformers have called them.
"""

import re
from collections.abc import Iterator

from balcap_mega.models.architecture import Architecture, Family

_RENAMED: dict[Family, tuple[tuple[str, str], ...]] = {
    "qwen2_5_vl": (
        (r"^model\.language_model\.", "model."),
        (r"^model\.visual\.", "visual."),
    ),
    "llava": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
}

_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


def canonical_name(family: Family, name: str) -> str | None:
    """The released checkpoints' name of a tensor that some version of transformers stored or holds as `name`.

    None for the constants that old versions stored beside the weights.
    """
    if _NOT_WEIGHTS.search(name):
        return None
    for pattern, replacement in _RENAMED[family]:
        name = re.sub(pattern, replacement, name)
    return name


def huggingface_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape; a tied head is not among them."""
    hidden, ffn, head_dim = architecture.hidden_size, architecture.ffn_hidden_size, architecture.head_dim
    queries, keys = architecture.num_attention_heads * head_dim, architecture.num_kv_heads * head_dim
    language = language_prefix(architecture)
    shapes = vision_shapes(architecture)
    shapes[f"{language}model.embed_tokens.weight"] = (architecture.vocab_size, hidden)
    for layer in range(architecture.num_layers):
        prefix = f"{language}model.layers.{layer}."
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            if architecture.qkv_bias:
                shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{language}model.norm.weight"] = (hidden,)
    if not architecture.tie_word_embeddings:
        shapes[f"{language}lm_head.weight"] = (architecture.vocab_size, hidden)
    return shapes


def head_name(architecture: Architecture) -> str:
    """The Hugging Face tensor that the LM head multiplies by: the embedding's own where they are tied."""
    language = language_prefix(architecture)
    return f"{language}model.embed_tokens.weight" if architecture.tie_word_embeddings else f"{language}lm_head.weight"


def language_prefix(architecture: Architecture) -> str:
    """What the language model's names start with: `model.layers...`, `lm_head...` of either family follow it."""
    return {"qwen2_5_vl": "", "llava": "language_model."}[architecture.family]


def vision_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor, with its shape, of the vision tower and what projects it into the language model."""
    return dict(
        {"qwen2_5_vl": _qwen2_5_vision_shapes, "llava": _llava_vision_shapes}[architecture.family](architecture)
    )


def _linear(name: str, rows: int, cols: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, cols)
    yield f"{name}.bias", (rows,)


def _qwen2_5_vision_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = architecture.vision.vision_config
    hidden, ffn = config.hidden_size, config.intermediate_size
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    yield "visual.patch_embed.proj.weight", (hidden, *patch)
    for block in range(config.depth):
        prefix = f"visual.blocks.{block}."
        yield prefix + "norm1.weight", (hidden,)
        yield prefix + "norm2.weight", (hidden,)
        yield from _linear(prefix + "attn.qkv", 3 * hidden, hidden)
        yield from _linear(prefix + "attn.proj", hidden, hidden)
        yield from _linear(prefix + "mlp.gate_proj", ffn, hidden)
        yield from _linear(prefix + "mlp.up_proj", ffn, hidden)
        yield from _linear(prefix + "mlp.down_proj", hidden, ffn)
    merged = hidden * config.spatial_merge_size**2
    yield "visual.merger.ln_q.weight", (hidden,)
    yield from _linear("visual.merger.mlp.0", merged, merged)
    yield from _linear("visual.merger.mlp.2", config.out_hidden_size, merged)


def _llava_vision_shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    config = architecture.vision.vision_config
    hidden, ffn, patch = config.hidden_size, config.intermediate_size, config.patch_size
    tower = "vision_tower.vision_model."
    yield tower + "embeddings.class_embedding", (hidden,)
    yield tower + "embeddings.patch_embedding.weight", (hidden, config.num_channels, patch, patch)
    yield tower + "embeddings.position_embedding.weight", ((config.image_size // patch) ** 2 + 1, hidden)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield f"{tower}{norm}.weight", (hidden,)
        yield f"{tower}{norm}.bias", (hidden,)
    for layer in range(config.num_hidden_layers):
        prefix = f"{tower}encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{prefix}{norm}.weight", (hidden,)
            yield f"{prefix}{norm}.bias", (hidden,)
        for part in ("q", "k", "v", "out"):
            yield from _linear(f"{prefix}self_attn.{part}_proj", hidden, hidden)
        yield from _linear(prefix + "mlp.fc1", ffn, hidden)
        yield from _linear(prefix + "mlp.fc2", hidden, ffn)
    language_hidden = architecture.hidden_size
    bias = architecture.vision.multimodal_projector_bias
    for name, cols in (("linear_1", hidden), ("linear_2", language_hidden)):
        yield f"multi_modal_projector.{name}.weight", (language_hidden, cols)
        if bias:
            yield f"multi_modal_projector.{name}.bias", (language_hidden,)
