"""The tensors of a checkpoint in the Hugging Face layout: their names and shapes, by configuration alone.

Names are those of the released checkpoints, which transformers and vLLM both load; `canonical_name` translates what
else versions of transformers have called them.
"""

import re

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families.interface import Family

_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")


def canonical_name(family: Family, name: str) -> str | None:
    """The released checkpoints' name of a tensor that some version of transformers stored or holds as `name`.

    None for the constants that old versions stored beside the weights.
    """
    return None if _NOT_WEIGHTS.search(name) else family.canonical_name(name)


def huggingface_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint with its shape; a tied head is not among them."""
    hidden, ffn, head_dim = architecture.hidden_size, architecture.ffn_hidden_size, architecture.head_dim
    queries, keys = architecture.num_attention_heads * head_dim, architecture.num_kv_heads * head_dim
    decoder = architecture.family.decoder_prefix
    shapes = vision_shapes(architecture)
    shapes[f"{decoder}embed_tokens.weight"] = (architecture.vocab_size, hidden)
    for layer in range(architecture.num_layers):
        prefix = f"{decoder}layers.{layer}."
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
            if architecture.decoder.qkv_bias:
                shapes[f"{prefix}self_attn.{part}_proj.bias"] = (rows,)
        if architecture.decoder.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, queries)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes[f"{decoder}norm.weight"] = (hidden,)
    if not architecture.tie_word_embeddings:
        shapes[architecture.family.head] = (architecture.vocab_size, hidden)
    return shapes


def head_name(architecture: Architecture) -> str:
    """The Hugging Face tensor that the LM head multiplies by: the embedding's own where they are tied."""
    family = architecture.family
    return f"{family.decoder_prefix}embed_tokens.weight" if architecture.tie_word_embeddings else family.head


def vision_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor, with its shape, of the vision tower and what projects it into the language model."""
    return dict(architecture.family.vision_shapes(architecture.config))
