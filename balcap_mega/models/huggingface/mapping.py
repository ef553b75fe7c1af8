"""One table a model family: which rectangle of which Hugging Face tensor stands where in a rank's parameters.

Import, export and resharding all read it, so no two converters can disagree. It is plain Python: any rank computes any
other rank's table, and two tables over the same Hugging Face tensors (Megatron's and vLLM's) intersect to a transfer
plan.

Every tensor is a matrix here, [shape[0], product of the rest]; a vector has one column.

Over the tensor-parallel ranks of a Megatron stage a tensor is either whole on every rank (norms, vision) or cut into
disjoint blocks. A tied embedding also stands on the last stage at pipeline size > 1, as `output_layer.weight`. Rows of
a vocabulary-parallel parameter that no block covers are padding.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.tensors import head_name, huggingface_shapes, language_prefix, vision_shapes

Span = tuple[int, int]
"""Half-open: [start, stop)."""


@dataclass(frozen=True)
class Block:
    """Rectangle [hf_rows, hf_cols] of the Hugging Face tensor `hf_name` is [rows, cols] of this rank's `parameter`."""

    hf_name: str
    hf_rows: Span
    hf_cols: Span
    parameter: str
    rows: Span
    cols: Span


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
    table = _Table(huggingface_shapes(architecture), tensor_rank, tensor_size)
    language = language_prefix(architecture)
    is_first, is_last = pipeline_rank == 0, pipeline_rank == pipeline_size - 1
    vocab_rows = architecture.padded_vocab_size(tensor_size) // tensor_size
    if is_first:
        for name in vision_shapes(architecture):
            table.whole("vision." + name.replace("vision_tower.vision_model.", "vision_tower."), name)
        embedding = f"{language}model.embed_tokens.weight"
        table.vocabulary("language_model.embedding.word_embeddings.weight", embedding, vocab_rows)

    input_norm, mlp_norm = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if transformer_engine:
        input_norm, mlp_norm = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    layers_per_stage = architecture.layers_per_stage(pipeline_size)
    first_layer = sum(layers_per_stage[:pipeline_rank])
    for local in range(layers_per_stage[pipeline_rank]):
        source = f"{language}model.layers.{first_layer + local}."
        target = f"language_model.decoder.layers.{local}."
        table.whole(target + input_norm, source + "input_layernorm.weight")
        for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
            heads = _interleaved_heads(architecture, source + "self_attn.", kind)
            table.stack(f"{target}self_attention.linear_qkv.{kind}", table.share_of(heads))
        table.columns(target + "self_attention.linear_proj.weight", source + "self_attn.o_proj.weight")
        table.whole(target + mlp_norm, source + "post_attention_layernorm.weight")
        gate_up = [table.rows_of(source + f"mlp.{part}_proj.weight") for part in ("gate", "up")]
        table.stack(target + "mlp.linear_fc1.weight", gate_up)
        table.columns(target + "mlp.linear_fc2.weight", source + "mlp.down_proj.weight")

    if is_last:
        table.whole("language_model.decoder.final_layernorm.weight", f"{language}model.norm.weight")
        if not (is_first and architecture.tie_word_embeddings):
            table.vocabulary("language_model.output_layer.weight", head_name(architecture), vocab_rows)
    return table.blocks


VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`), then cuts it evenly."""


def vllm_blocks(
    architecture: Architecture, *, tensor_rank: int, tensor_size: int, vision_data_parallel: bool = False
) -> list[Block]:
    """The whole content of one rank's unquantised vLLM 0.32 model, named as in its `named_parameters()`.

    `vision_data_parallel`: vLLM's `mm_encoder_tp_mode="data"` (Qwen2.5-VL): the vision tower is whole on every rank.
    """
    _check_heads(architecture, tensor_size)
    table = _Table(huggingface_shapes(architecture), tensor_rank, tensor_size)
    vision = _Table(table.shapes, 0, 1) if vision_data_parallel else table
    {"qwen2_5_vl": _vllm_qwen2_5_vision, "llava": _vllm_llava_vision}[architecture.family](architecture, vision)
    if vision is not table:
        table.blocks += vision.blocks

    language = language_prefix(architecture)
    padded_vocab = -(-architecture.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
    embedding = f"{language}model.embed_tokens.weight"
    table.vocabulary("language_model.model.embed_tokens.weight", embedding, padded_vocab // tensor_size)
    kv_shares = min(tensor_size, architecture.num_kv_heads)  # with fewer heads than ranks, several ranks hold one head
    kv_share = tensor_rank * kv_shares // tensor_size
    for layer in range(architecture.num_layers):
        source, target = f"{language}model.layers.{layer}.", f"language_model.model.layers.{layer}."
        table.whole(target + "input_layernorm.weight", source + "input_layernorm.weight")
        for kind in ("weight", "bias") if architecture.qkv_bias else ("weight",):
            query = table.rows_of(f"{source}self_attn.q_proj.{kind}")
            key_value = [table.rows_of(f"{source}self_attn.{x}_proj.{kind}", kv_share, kv_shares) for x in "kv"]
            table.stack(f"{target}self_attn.qkv_proj.{kind}", [query, *key_value])
        table.columns(target + "self_attn.o_proj.weight", source + "self_attn.o_proj.weight")
        table.whole(target + "post_attention_layernorm.weight", source + "post_attention_layernorm.weight")
        gate_up = [table.rows_of(source + f"mlp.{part}_proj.weight") for part in ("gate", "up")]
        table.stack(target + "mlp.gate_up_proj.weight", gate_up)
        table.columns(target + "mlp.down_proj.weight", source + "mlp.down_proj.weight")
    table.whole("language_model.model.norm.weight", f"{language}model.norm.weight")
    if not architecture.tie_word_embeddings:
        table.vocabulary("language_model.lm_head.weight", head_name(architecture), padded_vocab // tensor_size)
    return table.blocks


Piece = tuple[str, int, int]
"""Rows [start, stop) of a Hugging Face tensor, at full width."""


class _Table:
    """Collects blocks of one tensor-parallel rank; each method places Hugging Face tensors in one parameter."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], tensor_rank: int, tensor_size: int):
        self.shapes, self.rank, self.size = shapes, tensor_rank, tensor_size
        self.blocks: list[Block] = []

    def stack(self, parameter: str, pieces: Iterable[Piece]) -> None:
        """The pieces, one below the other."""
        row = 0
        for name, start, stop in pieces:
            if start == stop:  # a vocabulary that ends before this rank's rows begin
                continue
            cols = (0, math.prod(self.shapes[name][1:]))
            self.blocks.append(Block(name, (start, stop), cols, parameter, (row, row + stop - start), cols))
            row += stop - start

    def whole(self, parameter: str, name: str) -> None:
        self.stack(parameter, [(name, 0, self.shapes[name][0])])

    def rows(self, parameter: str, name: str) -> None:
        """Column-parallel: this rank's even share of the output channels, which are the rows."""
        self.stack(parameter, [self.rows_of(name)])

    def columns(self, parameter: str, name: str) -> None:
        """Row-parallel: this rank's even share of the input channels, which are the columns."""
        rows, total = self.shapes[name]
        width = _divide(total, self.size, name)
        start = self.rank * width
        self.blocks.append(Block(name, (0, rows), (start, start + width), parameter, (0, rows), (0, width)))

    def vocabulary(self, parameter: str, name: str, rows: int) -> None:
        """Vocabulary-parallel: `rows` rows a rank, of which those past the vocabulary's end are padding."""
        vocab_size = self.shapes[name][0]
        start, stop = (min(edge * rows, vocab_size) for edge in (self.rank, self.rank + 1))
        self.stack(parameter, [(name, start, stop)])

    def rows_of(self, name: str, share: int | None = None, shares: int | None = None) -> Piece:
        """Rows of the `share`-th of `shares` even shares: this rank's own unless told."""
        share, shares = (self.rank, self.size) if shares is None else (share, shares)
        rows = _divide(self.shapes[name][0], shares, name)
        return name, share * rows, (share + 1) * rows

    def share_of(self, pieces: list[Piece]) -> Iterator[Piece]:
        """This rank's even share of the rows of all pieces, stacked in their order."""
        total = sum(stop - start for _, start, stop in pieces)
        length = _divide(total, self.size, pieces[0][0])
        first, last, row = self.rank * length, (self.rank + 1) * length, 0
        for name, start, stop in pieces:
            low, high = max(start, start + first - row), min(stop, start + last - row)
            if low < high:
                yield name, low, high
            row += stop - start


def _divide(rows: int, size: int, name: str) -> int:
    if rows % size:
        raise ValueError(f"{name}: {rows} cannot be cut into {size} even parts")
    return rows // size


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


def _vllm_qwen2_5_vision(architecture: Architecture, table: _Table) -> None:
    for name in ("patch_embed.proj.weight", "merger.ln_q.weight"):
        table.whole(f"visual.{name}", f"visual.{name}")
    for block in range(architecture.vision.vision_config.depth):
        prefix = f"visual.blocks.{block}."
        for name in ("norm1.weight", "norm2.weight"):
            table.whole(prefix + name, prefix + name)
        for kind in ("weight", "bias"):
            fused = f"{prefix}attn.qkv.{kind}"
            parts = [table.rows_of(fused, part * table.size + table.rank, 3 * table.size) for part in range(3)]
            table.stack(fused, parts)
            gate_up = [table.rows_of(f"{prefix}mlp.{part}_proj.{kind}") for part in ("gate", "up")]
            table.stack(f"{prefix}mlp.gate_up_proj.{kind}", gate_up)
        _same_row_parallel(table, prefix + "attn.proj")
        _same_row_parallel(table, prefix + "mlp.down_proj")
    _same_column_parallel(table, "visual.merger.mlp.0")
    _same_row_parallel(table, "visual.merger.mlp.2")


def _vllm_llava_vision(architecture: Architecture, table: _Table) -> None:
    """vLLM builds the tower only up to the feature layer, and without the norm after the last."""
    config = architecture.vision
    depth = config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)
    tower = "vision_tower.vision_model."
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    for name in (*(f"embeddings.{name}" for name in embeddings), "pre_layrnorm.weight", "pre_layrnorm.bias"):
        table.whole(tower + name, tower + name)
    for layer in range(depth):
        prefix = f"{tower}encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for norm in ("layer_norm1", "layer_norm2"):
                table.whole(f"{prefix}{norm}.{kind}", f"{prefix}{norm}.{kind}")
            qkv = [table.rows_of(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
            table.stack(f"{prefix}self_attn.qkv_proj.{kind}", qkv)
        _same_row_parallel(table, prefix + "self_attn.out_proj")
        _same_column_parallel(table, prefix + "mlp.fc1")
        _same_row_parallel(table, prefix + "mlp.fc2")
    _same_column_parallel(table, "multi_modal_projector.linear_1")
    _same_row_parallel(table, "multi_modal_projector.linear_2")


def _same_column_parallel(table: _Table, name: str) -> None:
    """A linear under the same name in both; its bias, if it has one, is cut with its output channels."""
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in table.shapes:
            table.rows(f"{name}.{kind}", f"{name}.{kind}")


def _same_row_parallel(table: _Table, name: str) -> None:
    """A linear under the same name in both; its bias, if it has one, is whole on every rank."""
    table.columns(f"{name}.weight", f"{name}.weight")
    if f"{name}.bias" in table.shapes:
        table.whole(f"{name}.bias", f"{name}.bias")
