"""A family is known to its own module alone, and what its released checkpoints say is accepted or refused by name."""

import re
from pathlib import Path

import pytest

from balcap_mega.config.schema import ParallelConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.released import RELEASED
from tests.support.released import write_config

ROOT = Path(__file__).parent.parent
HOME = ROOT / "balcap_mega" / "models" / "families"


@pytest.mark.parametrize("folder", ["balcap_mega", "launch", "benchmarks"])
def test_no_other_module_knows_a_family(folder):
    """Neither by `model_type` nor by transformers' class names; names of released checkpoints are no such thing."""
    names = re.compile(r"\b(" + "|".join(FAMILIES) + r")\b|Qwen\d\w*VL|Llava[A-Z]|CLIP[A-Z]")
    for path in sorted((ROOT / folder).rglob("*.py")):
        if HOME not in path.parents:
            assert not names.findall(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_are_accepted(name, tmp_path):
    architecture = Architecture.from_folder(write_config(tmp_path, name))
    assert architecture.family.released[name]["model_type"] == architecture.family.name
    assert len(architecture.decoder.rotary_axes) == architecture.head_dim // 2


ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("LLaVA-1.5-7B", {"vision_config": {"attention_dropout": 0.1}}, r"vision_config\.attention_dropout=0\.1"),
        ("LLaVA-1.5-7B", {"text_config": {"attention_dropout": 0.1}}, r"text_config\.attention_dropout=0\.1"),
        ("LLaVA-1.5-13B", {"vision_config": {"dropout": 0.5}}, r"vision_config\.dropout=0\.5"),
        ("LLaVA-1.5-13B", {"text_config": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ("LLaVA-1.5-13B", {"text_config": {"logit_scale": 2.0}}, r"logit_scale=2\.0"),
        ("Qwen2.5-VL-3B", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("Qwen2.5-VL-3B", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("Qwen2.5-VL-3B", {"vision_config": {"out_hidden_size": 64}}, r"vision_config\.out_hidden_size=64"),
        ("Qwen3-VL-8B", {"text_config": {"rope_scaling": ROPE | {"mrope_interleaved": False}}}, "mrope_interleaved"),
        ("Qwen3-VL-8B", {"vision_config": {"deepstack_visual_indexes": [8, 16, 27]}}, "deepstack_visual_indexes"),
        ("Qwen3-VL-8B", {"text_config": {"attention_bias": True}}, "attention_bias=True"),
        # Public relatives of LLaVA-1.5: tiles, BakLLaVA, a decoder of Qwen2 behind SigLIP, several feature layers.
        ("LLaVA-1.5-7B", {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}, "'llava_next'"),
        ("LLaVA-1.5-7B", {"text_config": {"model_type": "mistral"}}, r"text_config\.model_type='mistral'"),
        ("LLaVA-1.5-7B", {"text_config": {"model_type": "qwen2"}}, r"text_config\.model_type='qwen2'"),
        ("LLaVA-1.5-7B", {"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ("LLaVA-1.5-7B", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
        ("LLaVA-1.5-7B", {"vision_feature_layer": [-2, -5]}, "vision_feature_layer='list'"),
        ("Qwen3-VL-8B", {"model_type": "qwen3_vl_moe"}, r"'qwen3_vl_moe'.*Qwen3-VL \(qwen3_vl\)"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, change, said, tmp_path):
    with pytest.raises(UserError, match=said):
        Architecture.from_folder(write_config(tmp_path, name, **change))


def test_a_first_stage_shorter_than_deepstack_is_refused(tmp_path):
    architecture = Architecture.from_folder(write_config(tmp_path, "Qwen3-VL-8B"))
    architecture.check_layout(ParallelConfig(pipeline=12))  # 36 layers, three on each
    with pytest.raises(UserError, match=r"leaves 2 .* each of the first 3 .*parallel\.pipeline to at most 12"):
        architecture.check_layout(ParallelConfig(pipeline=13))
