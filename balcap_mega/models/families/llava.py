"""LLaVA-1.5 (arXiv 2310.03744): a CLIP tower read before its last layer, a two-layer projector, a Llama decoder.

7B and 13B, and others of that computation, such as one with Llama 3. LLaVA-NeXT cuts pictures into tiles, others have
SigLIP towers or decoders with sliding windows: they are refused by name.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from balcap_mega.models.families.interface import Decoder, Family, Shapes, TinySpec
from balcap_mega.models.families.tiny import DECODER, save, train_bpe
from balcap_mega.models.huggingface.table import Table, linear
from balcap_mega.models.vision import VisionInputs, VisionTower
from balcap_mega.parallel.transfer import concatenated

TOWER = "vision_tower.vision_model."

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class LlavaVisionTower(VisionTower):
    """CLIP ViT up to the feature layer, class token dropped, then the two-layer projector."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        from transformers.models.clip.modeling_clip import CLIPVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.width = config.text_config.hidden_size
        self.depth = _feature_depth(config)
        for unused in [*self.vision_tower.encoder.layers[self.depth :], self.vision_tower.post_layernorm]:
            unused.requires_grad_(False)

    def token_count(self, image: VisionInputs) -> int:
        return self.vision_tower.embeddings.num_patches

    def forward(self, images: Sequence[VisionInputs]) -> Tensor:
        tower = self.vision_tower
        weight = self.multi_modal_projector.linear_1.weight
        pixels = concatenated([image.pixel_values for image in images], weight)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.depth]:
            hidden = layer(hidden, attention_mask=None)
        return self.multi_modal_projector(hidden[:, 1:]).flatten(0, 1)


def _feature_depth(config: PretrainedConfig) -> int:
    """Layers that run: `vision_feature_layer` indexes the embeddings and then each layer's output."""
    return config.vision_feature_layer % (config.vision_config.num_hidden_layers + 1)


def _released(hidden, ffn, layers, heads, **text: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "image_seq_length": 576,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "max_position_embeddings": 4096,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
            **text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


LLAMA_3 = _released(
    4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128320, rope_theta=500000.0, max_position_embeddings=8192
) | {"image_token_index": 128257, "pad_token_id": 128258}
"""xtuner/llava-llama-3-8b-v1_1-transformers."""


class Llava(Family):
    name = "llava"
    title = "LLaVA-1.5"
    text_models = ("llama",)
    decoder_prefix = "language_model.model."
    head = "language_model.lm_head.weight"
    renamed = (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(?!vision_model\.)", TOWER),
    )
    vision_modules = ("vision_tower", "multi_modal_projector")
    padding_processor = "LlavaImageProcessor"
    released: ClassVar = {
        "LLaVA-1.5-7B": _released(4096, 11008, 32, 32),
        "LLaVA-1.5-13B": _released(5120, 13824, 40, 40),
        "LLaVA-Llama-3-8B": LLAMA_3,
    }

    def decoder(self, config: PretrainedConfig) -> Decoder:
        text = config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Decoder(rotary_axes=(0,) * (head_dim // 2))

    def requirements(self, config: PretrainedConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        return {
            "vision_config.model_type": (config.vision_config.model_type, ("clip_vision_model",)),
            "vision_feature_select_strategy": (config.vision_feature_select_strategy, ("default",)),
            "type of vision_feature_layer": (type(config.vision_feature_layer).__name__, ("int",)),
        }

    def images(self, inputs: Mapping[str, Any]) -> list[VisionInputs]:
        return [VisionInputs(pixels[None]) for pixels in inputs["pixel_values"]]

    def image_grid(self, image_processor: Any, size: tuple[int, int]) -> Tensor | None:
        return None

    def position_ids(self, config: PretrainedConfig, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        return torch.arange(len(token_ids)).repeat(3, 1)

    def vision_tower(self, config: PretrainedConfig) -> LlavaVisionTower:
        return LlavaVisionTower(config)

    def vision_shapes(self, config: PretrainedConfig) -> Shapes:
        vision = config.vision_config
        hidden, ffn, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
        yield TOWER + "embeddings.class_embedding", (hidden,)
        yield TOWER + "embeddings.patch_embedding.weight", (hidden, vision.num_channels, patch, patch)
        yield TOWER + "embeddings.position_embedding.weight", ((vision.image_size // patch) ** 2 + 1, hidden)
        for norm in ("pre_layrnorm", "post_layernorm"):
            yield f"{TOWER}{norm}.weight", (hidden,)
            yield f"{TOWER}{norm}.bias", (hidden,)
        for layer in range(vision.num_hidden_layers):
            prefix = f"{TOWER}encoder.layers.{layer}."
            for norm in ("layer_norm1", "layer_norm2"):
                yield f"{prefix}{norm}.weight", (hidden,)
                yield f"{prefix}{norm}.bias", (hidden,)
            for part in ("q", "k", "v", "out"):
                yield from linear(f"{prefix}self_attn.{part}_proj", hidden, hidden)
            yield from linear(prefix + "mlp.fc1", ffn, hidden)
            yield from linear(prefix + "mlp.fc2", hidden, ffn)
        language_hidden, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        yield from linear("multi_modal_projector.linear_1", language_hidden, hidden, bias=bias)
        yield from linear("multi_modal_projector.linear_2", language_hidden, language_hidden, bias=bias)

    def vision_parameter(self, name: str) -> str:
        return "vision." + name.replace(TOWER, "vision_tower.")

    def vllm_vision(self, config: PretrainedConfig, table: Table) -> None:
        """vLLM builds the tower only up to the feature layer, and without the norm after the last."""
        embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
        for name in (*(f"embeddings.{name}" for name in embeddings), "pre_layrnorm.weight", "pre_layrnorm.bias"):
            table.whole(TOWER + name, TOWER + name)
        for layer in range(_feature_depth(config)):
            prefix = f"{TOWER}encoder.layers.{layer}."
            for kind in ("weight", "bias"):
                for norm in ("layer_norm1", "layer_norm2"):
                    table.whole(f"{prefix}{norm}.{kind}", f"{prefix}{norm}.{kind}")
                qkv = [table.rows_of(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
                table.stack(f"{prefix}self_attn.qkv_proj.{kind}", qkv)
            table.row_parallel(prefix + "self_attn.out_proj", prefix + "self_attn.out_proj")
            table.column_parallel(prefix + "mlp.fc1", prefix + "mlp.fc1")
            table.row_parallel(prefix + "mlp.fc2", prefix + "mlp.fc2")
        table.column_parallel("multi_modal_projector.linear_1", "multi_modal_projector.linear_1")
        table.row_parallel("multi_modal_projector.linear_2", "multi_modal_projector.linear_2")

    def image_tokens(self, config: PretrainedConfig) -> int:
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def picture(self, config: PretrainedConfig, image_tokens: int) -> tuple[tuple[int, ...], None]:
        side = config.vision_config.image_size
        return (1, 3, side, side), None

    def vision_flops(self, config: PretrainedConfig, image_tokens: int) -> float:
        patches, depth = image_tokens + 1, _feature_depth(config)
        flops = 0.0
        for name, shape in self.vision_shapes(config):
            layer = re.search(r"\.layers\.(\d+)\.", name)
            never_run = layer is not None and int(layer[1]) >= depth
            if len(shape) > 1 and "position_embedding" not in name and not never_run:
                flops += 2 * math.prod(shape) * (image_tokens if "projector" in name else patches)
        return flops + 4 * config.vision_config.hidden_size * depth * patches**2

    def write_tiny(self, spec: TinySpec) -> None:
        from transformers import (
            CLIPImageProcessor,
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
            LlavaProcessor,
            PreTrainedTokenizerFast,
        )

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=train_bpe(spec.texts, spec.vocab_size, SPECIAL_TOKENS),
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
            model_input_names=["input_ids", "attention_mask"],
        )
        token_id = tokenizer.convert_tokens_to_ids
        text = {
            **DECODER,
            "vocab_size": len(tokenizer),
            "rms_norm_eps": 1e-5,
            "bos_token_id": token_id("<s>"),
            "eos_token_id": token_id("</s>"),
            "pad_token_id": token_id("<pad>"),
            "tie_word_embeddings": spec.tie_word_embeddings,
            **spec.text,
        }
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
            "projection_dim": 64,
            **spec.vision,
        }
        side = vision["image_size"]
        config = LlavaConfig(
            text_config=LlamaConfig(**text),
            vision_config=CLIPVisionConfig(**vision),
            image_token_index=token_id("<image>"),
            image_seq_length=(side // vision["patch_size"]) ** 2,
            vision_feature_layer=-2,
            tie_word_embeddings=spec.tie_word_embeddings,
        )
        image_processor = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_center_crop=True
        )
        processor = LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=vision["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
        save(spec.folder, LlavaForConditionalGeneration(config), processor)
        _rename_tower(spec)


def _rename_tower(spec: TinySpec) -> None:
    """The tower's names as published checkpoints have them: transformers reads both, vLLM only these."""
    path = spec.folder / "model.safetensors"
    weights = load_file(path)
    renamed = {re.sub(r"^vision_tower\.(?!vision_model\.)", TOWER, name): value for name, value in weights.items()}
    save_file(renamed, path, metadata={"format": "pt"})
