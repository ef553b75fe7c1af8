"""The mapping tables: names and shapes against transformers' own models, and every element in exactly one place."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.huggingface.mapping import megatron_blocks, vllm_blocks
from balcap_mega.models.huggingface.table import Block
from balcap_mega.models.huggingface.tensors import canonical_name, huggingface_shapes
from balcap_mega.models.released import RELEASED
from tests.support.released import write_config


@pytest.fixture(scope="module")
def architectures(tmp_path_factory) -> dict[str, Architecture]:
    root = tmp_path_factory.mktemp("released")
    return {name: Architecture.from_folder(write_config(root / name, name)) for name in RELEASED}


@pytest.mark.parametrize("name", RELEASED)
def test_names_and_shapes_are_those_of_transformers(name, architectures, tmp_path):
    architecture = architectures[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(write_config(tmp_path, name)))
    parameters = {
        canonical_name(architecture.family, key): tuple(value.shape) for key, value in model.named_parameters()
    }
    assert parameters == huggingface_shapes(architecture)


@pytest.mark.parametrize(
    ("family", "stored", "canonical"),
    [
        ("qwen2_5_vl", "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.language_model.norm.weight", "model.norm.weight"),
        ("qwen2_5_vl", "model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("llava", "language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("llava", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("llava", "lm_head.weight", "language_model.lm_head.weight"),
        ("llava", "vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("llava", "vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("llava", "model.vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("llava", "model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("llava", "model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("llava", "vision_tower.vision_model.embeddings.position_ids", None),
        ("llava", "language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_every_generation_of_names_is_understood(family, stored, canonical):
    assert canonical_name(FAMILIES[family], stored) == canonical


def area(rows, cols) -> int:
    return (rows[1] - rows[0]) * (cols[1] - cols[0])


def overlap(a, b) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def assert_disjoint_and_complete(rectangles, height: int, width: int, what) -> None:
    """Rectangles of a height x width matrix that do not overlap and together are all of it."""
    assert sum(area(rows, cols) for rows, cols in rectangles) == height * width, what
    for rows, cols in rectangles:
        assert 0 <= rows[0] < rows[1] <= height and 0 <= cols[0] < cols[1] <= width, what
    for row_edges in (sorted({rows for rows, _ in rectangles}), sorted({cols for _, cols in rectangles})):
        assert not any(overlap(a, b) for a, b in itertools.pairwise(row_edges)), what


def check_blocks(blocks: list[Block], shapes) -> dict[str, int]:
    """Each block maps a rectangle to one of the same size, and no parameter's element twice: rows of each parameter."""
    by_parameter = defaultdict(list)
    for block in blocks:
        height, width = block.hf_rows[1] - block.hf_rows[0], block.hf_cols[1] - block.hf_cols[0]
        assert (height, width) == (block.rows[1] - block.rows[0], block.cols[1] - block.cols[0]), block
        assert 0 <= block.hf_rows[0] < block.hf_rows[1] <= shapes[block.hf_name][0], block
        by_parameter[block.parameter].append((block.rows, block.cols))
    extents = {}
    for parameter, rectangles in by_parameter.items():
        extents[parameter] = max(rows[1] for rows, _ in rectangles)
        assert_disjoint_and_complete(rectangles, extents[parameter], rectangles[0][1][1], parameter)
    return extents


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4), (8, 8), (4, 3)]


def fits(architecture: Architecture, tensor: int, pipeline: int) -> bool:
    heads = architecture.num_attention_heads % tensor == 0
    return heads and architecture.ffn_hidden_size % tensor == 0 and pipeline <= architecture.num_layers


def check_megatron(architecture: Architecture, tensor: int, pipeline: int, transformer_engine: bool) -> None:
    """Every element of every tensor once over the TP ranks of its stage (or whole on each of them), nothing else."""
    shapes = huggingface_shapes(architecture)
    stages_of = defaultdict(set)
    for stage in range(pipeline):
        pieces = defaultdict(lambda: defaultdict(list))
        extents = []
        for rank in range(tensor):
            blocks = megatron_blocks(
                architecture, tensor_rank=rank, tensor_size=tensor, pipeline_rank=stage, pipeline_size=pipeline,
                transformer_engine=transformer_engine,
            )  # fmt: skip
            extents.append(check_blocks(blocks, shapes))
            for block in blocks:
                key = (block.hf_name, block.parameter)
                pieces[key][rank].append((block.hf_rows, block.hf_cols))
                stages_of[block.hf_name].add(stage)
        for (name, parameter), by_rank in pieces.items():
            height, width = shapes[name][0], math.prod(shapes[name][1:])
            whole = len(by_rank) == tensor and all(
                rectangles == [((0, height), (0, width))] for rectangles in by_rank.values()
            )
            replicated = parameter.startswith("vision.") or "norm" in parameter
            if tensor == 1 or replicated:
                assert not replicated or whole, parameter
            assert_disjoint_and_complete(
                by_rank[0] if whole else [r for rectangles in by_rank.values() for r in rectangles], height, width, name
            )
        vocabulary = ("word_embeddings", "output_layer")
        for parameter, rows in extents[0].items():
            if not any(word in parameter for word in vocabulary):
                assert all(extent[parameter] == rows for extent in extents), parameter
    embedding = next(name for name in shapes if name.endswith("embed_tokens.weight"))
    tied = architecture.tie_word_embeddings
    assert stages_of.keys() == shapes.keys()
    for name, stages in stages_of.items():
        expected = {0, pipeline - 1} if tied and name == embedding else None
        assert stages == expected if expected else len(stages) == 1, name


@pytest.mark.parametrize("name", RELEASED)
def test_megatron_holds_every_element_once(name, architectures):
    architecture = architectures[name]
    for tensor, pipeline in LAYOUTS:
        if fits(architecture, tensor, pipeline):
            check_megatron(architecture, tensor, pipeline, transformer_engine=(tensor, pipeline) == (2, 2))


def test_odd_shapes(tmp_path):
    """Vocabulary not divisible by TP (and shorter than the padding), fewer key/value heads than ranks, tied, uneven."""
    for index, (tied, vocab, tensor) in enumerate(itertools.product((False, True), (267, 1021), (4, 8))):
        folder = write_config(
            tmp_path / str(index), "Qwen2.5-VL-3B", vocab_size=vocab, tie_word_embeddings=tied, num_hidden_layers=5
        )
        architecture = Architecture.from_folder(folder)
        for pipeline in (1, 2, 3, 5):
            check_megatron(architecture, tensor, pipeline, transformer_engine=False)


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_vllm_holds_every_element(name, tensor, architectures):
    """Every rank's parameters are full, and together the ranks hold all but what vLLM does not build."""
    architecture = architectures[name]
    if architecture.num_attention_heads % tensor:
        pytest.skip(f"{architecture.num_attention_heads} heads on {tensor} ranks")
    shapes = huggingface_shapes(architecture)
    vision = architecture.config.vision_config
    uneven_vision = architecture.family.vision_data_parallel and vision.intermediate_size % tensor
    covered = defaultdict(set)
    for rank in range(tensor):
        blocks = vllm_blocks(
            architecture, tensor_rank=rank, tensor_size=tensor, vision_data_parallel=bool(uneven_vision)
        )
        check_blocks(blocks, shapes)
        for block in blocks:
            covered[block.hf_name].add((block.hf_rows, block.hf_cols))
    for hf_name, rectangles in covered.items():
        assert_disjoint_and_complete(list(rectangles), shapes[hf_name][0], math.prod(shapes[hf_name][1:]), hf_name)
    unused = ("vision_tower.vision_model.encoder.layers.23.", "vision_tower.vision_model.post_layernorm.")
    assert shapes.keys() - covered.keys() == {key for key in shapes if key.startswith(unused)}


def test_interleaved_heads_with_fewer_kv_heads_than_ranks(architectures):
    """Qwen2.5-VL-3B has 16 query and 2 key/value heads of 128: over TP 8 each rank has 2.5 heads of [8 q, k, v] x 2."""
    heads = [*(("q", i) for i in range(8)), ("k", 0), ("v", 0), *(("q", i) for i in range(8, 16)), ("k", 1), ("v", 1)]
    rows = [(part, head * 128 + row) for part, head in heads for row in range(128)]
    found = []
    for rank in range(8):
        blocks = megatron_blocks(
            architectures["Qwen2.5-VL-3B"], tensor_rank=rank, tensor_size=8, pipeline_rank=0, pipeline_size=1
        )
        mine = [b for b in blocks if b.parameter == "language_model.decoder.layers.0.self_attention.linear_qkv.weight"]
        assert mine[-1].rows[1] == 320
        found += [(b.hf_name.split(".")[-2][0], row) for b in mine for row in range(*b.hf_rows)]
    assert found == rows


def test_layouts_that_do_not_divide_are_refused(architectures):
    with pytest.raises(ValueError, match="28 attention"):
        vllm_blocks(architectures["Qwen2.5-VL-7B"], tensor_rank=0, tensor_size=8, vision_data_parallel=True)
