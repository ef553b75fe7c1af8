"""Qwen2.5-VL (arXiv 2502.13923), 3B to 72B: window attention in the vision tower, sectioned multimodal rotary."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig
from transformers.vision_utils import get_vision_window_index

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


class Qwen2_5_VisionTower(QwenVisionTower):
    """ViT with attention within windows, and within the image in some of its layers."""

    def __init__(self, config: PretrainedConfig):
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        super().__init__(Qwen2_5_VisionTransformerPretrainedModel, config)

    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        visual = self.visual
        patches, grids, positions = self.inputs(images)
        windows, bounds = get_vision_window_index(
            grids, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        return visual(
            patches,
            grid_thw=grids,
            position_ids=positions,
            window_index=to_device(windows, patches.device),
            cu_window_seqlens=bounds,
        ).pooler_output


def _released(hidden, ffn, layers, heads, kv_heads, vocab, tied, vision_ffn) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_ffn,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


class Qwen2_5_VL(QwenVL):
    name = "qwen2_5_vl"
    title = "Qwen2.5-VL"
    text_models = ("qwen2_5_vl_text",)
    decoder_prefix = "model."
    head = "lm_head.weight"
    renamed = (
        (r"^model\.language_model\.", "model."),
        (r"^model\.visual\.", "visual."),
    )
    released: ClassVar = {
        "Qwen2.5-VL-3B": _released(2048, 11008, 36, 16, 2, 151936, True, 3420),
        "Qwen2.5-VL-7B": _released(3584, 18944, 28, 28, 4, 152064, False, 3420),
        "Qwen2.5-VL-32B": _released(5120, 27648, 64, 40, 8, 152064, False, 3456),
        "Qwen2.5-VL-72B": _released(8192, 29568, 80, 64, 8, 152064, False, 3456),
    }

    def decoder(self, config: PretrainedConfig) -> Decoder:
        temporal, height, width = config.text_config.rope_parameters["mrope_section"]
        return Decoder(rotary_axes=(0,) * temporal + (1,) * height + (2,) * width, qkv_bias=True)

    def vision_tower(self, config: PretrainedConfig) -> Qwen2_5_VisionTower:
        return Qwen2_5_VisionTower(config)

    def vision_shapes(self, config: PretrainedConfig) -> Shapes:
        vision = config.vision_config
        hidden, ffn = vision.hidden_size, vision.intermediate_size
        patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        yield "visual.patch_embed.proj.weight", (hidden, *patch)
        for block in range(vision.depth):
            prefix = f"visual.blocks.{block}."
            yield prefix + "norm1.weight", (hidden,)
            yield prefix + "norm2.weight", (hidden,)
            yield from linear(prefix + "attn.qkv", 3 * hidden, hidden)
            yield from linear(prefix + "attn.proj", hidden, hidden)
            yield from linear(prefix + "mlp.gate_proj", ffn, hidden)
            yield from linear(prefix + "mlp.up_proj", ffn, hidden)
            yield from linear(prefix + "mlp.down_proj", hidden, ffn)
        merged = hidden * vision.spatial_merge_size**2
        yield "visual.merger.ln_q.weight", (hidden,)
        yield from linear("visual.merger.mlp.0", merged, merged)
        yield from linear("visual.merger.mlp.2", vision.out_hidden_size, merged)

    def vllm_vision(self, config: PretrainedConfig, table: Table) -> None:
        for name in ("visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"):
            table.whole(name, name)
        for block in range(config.vision_config.depth):
            prefix = f"visual.blocks.{block}."
            for name in (prefix + "norm1.weight", prefix + "norm2.weight"):
                table.whole(name, name)
            for kind in ("weight", "bias"):
                table.stack(f"{prefix}attn.qkv.{kind}", table.thirds(f"{prefix}attn.qkv.{kind}"))
                gate_up = [table.rows_of(f"{prefix}mlp.{part}_proj.{kind}") for part in ("gate", "up")]
                table.stack(f"{prefix}mlp.gate_up_proj.{kind}", gate_up)
            for name in (prefix + "attn.proj", prefix + "mlp.down_proj"):
                table.row_parallel(name, name)
        table.column_parallel("visual.merger.mlp.0", "visual.merger.mlp.0")
        table.row_parallel("visual.merger.mlp.2", "visual.merger.mlp.2")

    def vision_flops(self, config: PretrainedConfig, image_tokens: int) -> float:
        vision = config.vision_config
        patches = image_tokens * vision.spatial_merge_size**2
        full_layers, window = len(vision.fullatt_block_indexes), (vision.window_size // vision.patch_size) ** 2
        flops = 0.0
        for name, shape in self.vision_shapes(config):
            if len(shape) > 1:
                flops += 2 * math.prod(shape) * (image_tokens if "merger" in name else patches)
        pairs = full_layers * patches**2 + (vision.depth - full_layers) * patches * window
        return flops + 4 * vision.hidden_size * pairs

    def write_tiny(self, spec: TinySpec) -> None:
        from transformers import (
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLProcessor,
            Qwen2VLImageProcessor,
            Qwen2VLVideoProcessor,
        )

        tokenizer = tiny_tokenizer(spec)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        text = tiny_text_config(spec, tokenizer, rope_parameters=rope)
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": text["hidden_size"],
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": initial_std(spec.vision.get("hidden_size", 64)),
            **spec.vision,
        }
        config = Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            **tiny_token_ids(tokenizer),
            tie_word_embeddings=spec.tie_word_embeddings,
        )
        image_processor = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280})
        processor = Qwen2_5_VLProcessor(
            image_processor, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
        )
        save(spec.folder, Qwen2_5_VLForConditionalGeneration(config), processor)
