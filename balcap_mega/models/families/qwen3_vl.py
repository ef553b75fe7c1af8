"""Qwen3-VL (arXiv 2511.21631), dense, 2B to 32B: query and key norms, interleaved multimodal rotary, DeepStack.

The tower interpolates learned positions to each image's grid, and hands features of several of its layers to the
decoder's first ones: behind the channels that stand at an image's places follow as many for each of those layers.

The mixture-of-experts sizes are another family (`qwen3_vl_moe`), which is not trained here. Its tower, processor,
positions and vision table are these; what it would need beside them stands in the README.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from balcap_mega.models.families.interface import Decoder, Shapes, TinySpec
from balcap_mega.models.families.qwen_vl import (
    CHAT_TEMPLATE,
    QwenVisionTower,
    QwenVL,
    tiny_text_config,
    tiny_token_ids,
    tiny_tokenizer,
)
from balcap_mega.models.families.tiny import initial_std, save
from balcap_mega.models.huggingface.table import Table, linear
from balcap_mega.models.vision import VisionInputs
from balcap_mega.parallel.transfer import to_device


class Qwen3_VisionTower(QwenVisionTower):
    """ViT with full attention within each image; a merger at its end, and one behind each DeepStack layer."""

    def __init__(self, config: PretrainedConfig):
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        super().__init__(Qwen3VLVisionModel, config, 1 + len(config.vision_config.deepstack_visual_indexes))

    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        visual = self.visual
        patches, grids, positions = self.inputs(images)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids,
            visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        output = visual(
            patches,
            grid_thw=grids,
            interp_indices=to_device(indices, patches.device),
            interp_weights=to_device(weights, patches.device),
            position_ids=positions,
        )
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=1)


def _mergers(config: PretrainedConfig) -> list[str]:
    levels = range(len(config.vision_config.deepstack_visual_indexes))
    return ["model.visual.merger.", *(f"model.visual.deepstack_merger_list.{level}." for level in levels)]


SMALL_TOWER = (24, 1024, 4096, [5, 11, 17])
LARGE_TOWER = (27, 1152, 4304, [8, 16, 24])


def _released(hidden, ffn, layers, heads, tied, tower) -> dict[str, Any]:
    depth, vision_hidden, vision_ffn, deepstack = tower
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": ffn,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": tied,
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": deepstack,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": vision_ffn,
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


class Qwen3_VL(QwenVL):
    name = "qwen3_vl"
    title = "Qwen3-VL"
    text_models = ("qwen3_vl_text",)
    decoder_prefix = "model.language_model."
    head = "lm_head.weight"
    renamed = ()
    released: ClassVar = {
        "Qwen3-VL-2B": _released(2048, 6144, 28, 16, True, SMALL_TOWER),
        "Qwen3-VL-4B": _released(2560, 9728, 36, 32, True, SMALL_TOWER),
        "Qwen3-VL-8B": _released(4096, 12288, 36, 32, False, LARGE_TOWER),
        "Qwen3-VL-32B": _released(5120, 25600, 64, 64, False, LARGE_TOWER),
    }

    def decoder(self, config: PretrainedConfig) -> Decoder:
        _, height, width = config.text_config.rope_parameters["mrope_section"]
        axes = [0] * (config.text_config.head_dim // 2)
        for axis, length in ((1, height), (2, width)):
            axes[axis : 3 * length : 3] = [axis] * len(axes[axis : 3 * length : 3])
        return Decoder(tuple(axes), qk_norm=True, deepstack=len(config.vision_config.deepstack_visual_indexes))

    def requirements(self, config: PretrainedConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        vision = config.vision_config
        levels = list(vision.deepstack_visual_indexes)
        return super().requirements(config) | {
            # transformers interleaves always, vLLM only where it is told to.
            "mrope_interleaved": (config.text_config.rope_parameters.get("mrope_interleaved", False), (True,)),
            "deepstack_visual_indexes": (levels, (sorted(set(levels) & set(range(vision.depth))),)),
        }

    def vision_tower(self, config: PretrainedConfig) -> Qwen3_VisionTower:
        return Qwen3_VisionTower(config)

    def vision_shapes(self, config: PretrainedConfig) -> Shapes:
        vision = config.vision_config
        hidden, ffn = vision.hidden_size, vision.intermediate_size
        patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        yield "model.visual.patch_embed.proj.weight", (hidden, *patch)
        yield "model.visual.patch_embed.proj.bias", (hidden,)
        yield "model.visual.pos_embed.weight", (vision.num_position_embeddings, hidden)
        for block in range(vision.depth):
            prefix = f"model.visual.blocks.{block}."
            for norm in ("norm1", "norm2"):
                yield f"{prefix}{norm}.weight", (hidden,)
                yield f"{prefix}{norm}.bias", (hidden,)
            yield from linear(prefix + "attn.qkv", 3 * hidden, hidden)
            yield from linear(prefix + "attn.proj", hidden, hidden)
            yield from linear(prefix + "mlp.linear_fc1", ffn, hidden)
            yield from linear(prefix + "mlp.linear_fc2", hidden, ffn)
        merged = hidden * vision.spatial_merge_size**2
        for prefix in _mergers(config):
            normed = merged if "deepstack" in prefix else hidden  # theirs norms what is merged already
            yield prefix + "norm.weight", (normed,)
            yield prefix + "norm.bias", (normed,)
            yield from linear(prefix + "linear_fc1", merged, merged)
            yield from linear(prefix + "linear_fc2", vision.out_hidden_size, merged)

    def vision_parameter(self, name: str) -> str:
        return "vision." + name.removeprefix("model.")

    def vllm_vision(self, config: PretrainedConfig, table: Table) -> None:
        def whole(*names: str) -> None:
            for name in names:
                table.whole(name.removeprefix("model."), name)

        def mlp(prefix: str) -> None:
            table.column_parallel(f"{prefix.removeprefix('model.')}linear_fc1", f"{prefix}linear_fc1")
            table.row_parallel(f"{prefix.removeprefix('model.')}linear_fc2", f"{prefix}linear_fc2")

        patches = "model.visual.patch_embed.proj."
        whole(patches + "weight", patches + "bias", "model.visual.pos_embed.weight")
        for block in range(config.vision_config.depth):
            prefix = f"model.visual.blocks.{block}."
            target = prefix.removeprefix("model.")
            for kind in ("weight", "bias"):
                whole(f"{prefix}norm1.{kind}", f"{prefix}norm2.{kind}")
                table.stack(f"{target}attn.qkv.{kind}", table.thirds(f"{prefix}attn.qkv.{kind}"))
            table.row_parallel(target + "attn.proj", prefix + "attn.proj")
            mlp(prefix + "mlp.")
        for prefix in _mergers(config):
            whole(prefix + "norm.weight", prefix + "norm.bias")
            mlp(prefix)

    def vision_flops(self, config: PretrainedConfig, image_tokens: int) -> float:
        vision = config.vision_config
        patches = image_tokens * vision.spatial_merge_size**2
        flops = 4.0 * vision.hidden_size * vision.depth * patches**2
        for name, shape in self.vision_shapes(config):
            if len(shape) > 1 and "pos_embed" not in name:
                flops += 2 * math.prod(shape) * (image_tokens if "merger" in name else patches)
        return flops

    def write_tiny(self, spec: TinySpec) -> None:
        from transformers import (
            Qwen2VLImageProcessor,
            Qwen3VLConfig,
            Qwen3VLForConditionalGeneration,
            Qwen3VLProcessor,
            Qwen3VLVideoProcessor,
        )

        tokenizer = tiny_tokenizer(spec)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
        text = tiny_text_config(spec, tokenizer, head_dim=64, rope_parameters=rope)
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 3,
            "num_heads": 4,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": initial_std(spec.vision.get("hidden_size", 64)),
            **spec.vision,
        }
        config = Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            **tiny_token_ids(tokenizer),
            tie_word_embeddings=spec.tie_word_embeddings,
        )
        image_processor = Qwen2VLImageProcessor(
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 1280},
        )
        processor = Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)
        save(spec.folder, Qwen3VLForConditionalGeneration(config), processor)
