"""One table a model: which rectangle of which Hugging Face tensor stands where in a rank's parameters.

Import, export and resharding all read it, so no two converters can disagree. It is plain Python: any rank computes any
other rank's table, and two tables over the same Hugging Face tensors (Megatron's and vLLM's) intersect to a transfer
plan.

Over the tensor-parallel ranks of a Megatron stage a tensor is either whole on every rank (norms, vision) or cut into
disjoint blocks. A tied embedding also stands on the last stage at pipeline size > 1, as `output_layer.weight`. Rows of
a vocabulary-parallel parameter that no block covers are padding.
"""

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.table import Block, Piece, Table
from balcap_mega.models.huggingface.tensors import head_name, huggingface_shapes, vision_shapes


def megatron_blocks(
    architecture: Architecture,
    *,
    tensor_rank: int,
    tensor_size: int,
    pipeline_rank: int,
    pipeline_size: int,
    transformer_engine: bool = False,
) -> list[Block]:
    """The whole content of one rank's part of `VisionLanguagePolicy`, named as in its `named_parameters()`.

    `transformer_engine`: norms are parts of the linears that follow them and go by their names.
    """
    _check_heads(architecture, tensor_size)
    table = Table(huggingface_shapes(architecture), tensor_rank, tensor_size)
    prefix = architecture.family.decoder_prefix
    is_first, is_last = pipeline_rank == 0, pipeline_rank == pipeline_size - 1
    vocab_rows = architecture.padded_vocab_size(tensor_size) // tensor_size
    if is_first:
        for name in vision_shapes(architecture):
            table.whole(architecture.family.vision_parameter(name), name)
        table.vocabulary("language_model.embedding.word_embeddings.weight", f"{prefix}embed_tokens.weight", vocab_rows)

    input_norm, mlp_norm = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if transformer_engine:
        input_norm, mlp_norm = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    layers_per_stage = architecture.layers_per_stage(pipeline_size)
    first_layer = sum(layers_per_stage[:pipeline_rank])
    for local in range(layers_per_stage[pipeline_rank]):
        source = f"{prefix}layers.{first_layer + local}."
        target = f"language_model.decoder.layers.{local}."
        table.whole(target + input_norm, source + "input_layernorm.weight")
        for kind in _kinds(architecture):
            heads = _interleaved_heads(architecture, source + "self_attn.", kind)
            table.stack(f"{target}self_attention.linear_qkv.{kind}", table.share_of(heads))
        if architecture.decoder.qk_norm:
            for part in "qk":
                norm = f"{target}self_attention.{part}_layernorm.weight"
                table.whole(norm, f"{source}self_attn.{part}_norm.weight")
        table.columns(target + "self_attention.linear_proj.weight", source + "self_attn.o_proj.weight")
        table.whole(target + mlp_norm, source + "post_attention_layernorm.weight")
        gate_up = [table.rows_of(source + f"mlp.{part}_proj.weight") for part in ("gate", "up")]
        table.stack(target + "mlp.linear_fc1.weight", gate_up)
        table.columns(target + "mlp.linear_fc2.weight", source + "mlp.down_proj.weight")

    if is_last:
        table.whole("language_model.decoder.final_layernorm.weight", f"{prefix}norm.weight")
        if not (is_first and architecture.tie_word_embeddings):
            table.vocabulary("language_model.output_layer.weight", head_name(architecture), vocab_rows)
    return table.blocks


VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`), then cuts it evenly."""


def vllm_blocks(
    architecture: Architecture, *, tensor_rank: int, tensor_size: int, vision_data_parallel: bool = False
) -> list[Block]:
    """The whole content of one rank's unquantised vLLM 0.32 model, named as in its `named_parameters()`.

    `vision_data_parallel`: vLLM's `mm_encoder_tp_mode="data"`: the vision tower is whole on every rank.
    """
    _check_heads(architecture, tensor_size)
    table = Table(huggingface_shapes(architecture), tensor_rank, tensor_size)
    vision = Table(table.shapes, 0, 1) if vision_data_parallel else table
    architecture.family.vllm_vision(architecture.config, vision)
    if vision is not table:
        table.blocks += vision.blocks

    prefix = architecture.family.decoder_prefix
    padded_vocab = -(-architecture.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
    embedding = f"{prefix}embed_tokens.weight"
    table.vocabulary("language_model.model.embed_tokens.weight", embedding, padded_vocab // tensor_size)
    kv_shares = min(tensor_size, architecture.num_kv_heads)  # with fewer heads than ranks, several ranks hold one head
    kv_share = tensor_rank * kv_shares // tensor_size
    for layer in range(architecture.num_layers):
        source, target = f"{prefix}layers.{layer}.", f"language_model.model.layers.{layer}."
        table.whole(target + "input_layernorm.weight", source + "input_layernorm.weight")
        for kind in _kinds(architecture):
            query = table.rows_of(f"{source}self_attn.q_proj.{kind}")
            key_value = [table.rows_of(f"{source}self_attn.{x}_proj.{kind}", kv_share, kv_shares) for x in "kv"]
            table.stack(f"{target}self_attn.qkv_proj.{kind}", [query, *key_value])
        if architecture.decoder.qk_norm:
            for part in "qk":
                table.whole(f"{target}self_attn.{part}_norm.weight", f"{source}self_attn.{part}_norm.weight")
        table.columns(target + "self_attn.o_proj.weight", source + "self_attn.o_proj.weight")
        table.whole(target + "post_attention_layernorm.weight", source + "post_attention_layernorm.weight")
        gate_up = [table.rows_of(source + f"mlp.{part}_proj.weight") for part in ("gate", "up")]
        table.stack(target + "mlp.gate_up_proj.weight", gate_up)
        table.columns(target + "mlp.down_proj.weight", source + "mlp.down_proj.weight")
    table.whole("language_model.model.norm.weight", f"{prefix}norm.weight")
    if not architecture.tie_word_embeddings:
        table.vocabulary("language_model.lm_head.weight", head_name(architecture), padded_vocab // tensor_size)
    return table.blocks


def _kinds(architecture: Architecture) -> tuple[str, ...]:
    """Of the projections to queries, keys and values."""
    return ("weight", "bias") if architecture.decoder.qkv_bias else ("weight",)


def _check_heads(architecture: Architecture, tensor_size: int) -> None:
    queries, keys = architecture.num_attention_heads, architecture.num_kv_heads
    if queries % tensor_size or (keys % tensor_size and tensor_size % keys):
        raise ValueError(f"{queries} attention and {keys} key/value heads cannot be cut over {tensor_size} ranks")


def _interleaved_heads(architecture: Architecture, prefix: str, kind: str) -> list[Piece]:
    """Megatron's order of attention rows: for each key/value head its queries, then the key, then the value."""
    head, kv_heads = architecture.head_dim, architecture.num_kv_heads
    queries = architecture.num_attention_heads // kv_heads * head
    return [
        (f"{prefix}{part}_proj.{kind}", index * length, (index + 1) * length)
        for index in range(kv_heads)
        for part, length in (("q", queries), ("k", head), ("v", head))
    ]
