"""What the Qwen-VL families share: tokens, chat template, patches, the tower's inputs, multimodal rotary positions."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.vision_utils import get_vision_position_ids

from balcap_mega.models.families.interface import Family, TinySpec
from balcap_mega.models.families.tiny import DECODER, initial_std, train_bpe
from balcap_mega.models.vision import VisionInputs, VisionTower
from balcap_mega.models.vision_attention import BATCHED_SEGMENTS
from balcap_mega.parallel.transfer import concatenated, to_device

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MEGAPIXEL = 1280 * 28**2
"""Pixels of the picture that the planner assumes: about a square megapixel."""


class QwenVL(Family):
    """A ViT over patches of any number, merged by squares, in front of a decoder with multimodal rotary positions.

    vLLM gives its images whole to single ranks: the tower's layers cannot be cut evenly at every size.
    """

    vision_modules = ("visual",)
    vision_data_parallel = True
    media_tokens = ("<|vision_pad|>",)

    def requirements(self, config: PretrainedConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        vision = config.vision_config
        return {
            "vision_config.out_hidden_size": (vision.out_hidden_size, (config.text_config.hidden_size,)),
            # vLLM's rotary positions of patches know one base alone.
            "vision_config.rope_theta": (vision.rope_parameters["rope_theta"], (10000.0,)),
        }

    def images(self, inputs: Mapping[str, Any]) -> list[VisionInputs]:
        grids = inputs["image_grid_thw"]
        patches = inputs["pixel_values"].split(grids.prod(dim=1).tolist())
        return [VisionInputs(*image) for image in zip(patches, grids.split(1), strict=True)]

    def image_grid(self, image_processor: Any, size: tuple[int, int]) -> Tensor | None:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # with torchvision, 2 s

        patch, limits = image_processor.patch_size, image_processor.size
        height, width = smart_resize(
            size[1],
            size[0],
            patch * image_processor.merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
        return torch.tensor([[1, height // patch, width // patch]])

    def position_ids(self, config: PretrainedConfig, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        if image_grid_thw is None:
            return torch.arange(len(token_ids)).repeat(3, 1)
        return mrope_position_ids(
            token_ids == config.image_token_id, image_grid_thw, config.vision_config.spatial_merge_size
        )

    def image_tokens(self, config: PretrainedConfig) -> int:
        side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        return MEGAPIXEL // side**2

    def picture(self, config: PretrainedConfig, image_tokens: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        vision = config.vision_config
        merge = vision.spatial_merge_size
        rows = max(side for side in range(1, math.isqrt(image_tokens) + 1) if image_tokens % side == 0)
        grid = (1, rows * merge, image_tokens // rows * merge)
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return (math.prod(grid), channels), grid


class QwenVisionTower(VisionTower):
    """transformers' ViT of a Qwen-VL, with its 2x2 merger; as many embeddings an image as its size asks for."""

    def __init__(self, visual: Any, config: PretrainedConfig, levels: int = 1):
        """visual: transformers' class. levels: how many sets of `out_hidden_size` channels come out side by side."""
        super().__init__()
        self.visual = visual._from_config(deepcopy(config.vision_config))
        self.visual.config._attn_implementation = BATCHED_SEGMENTS
        self.width = levels * config.vision_config.out_hidden_size

    def token_count(self, image: VisionInputs) -> int:
        return int(image.image_grid_thw.prod()) // self.visual.spatial_merge_unit

    def inputs(self, images: Sequence[VisionInputs]) -> tuple[Tensor, Tensor, Tensor]:
        """(patches, grids, positions) of all images.

        patches:   [P, channels * temporal * patch * patch], on the tower's device and in its dtype
        grids:     [images, 3] int64, patches in time, height and width, on the host, and so what bounds segments
        positions: [P, 2] int64, row and column of each patch, on the tower's device
        """
        weight = self.visual.patch_embed.proj.weight
        grids = torch.cat([image.image_grid_thw for image in images])
        positions = get_vision_position_ids(grids, self.visual.spatial_merge_size)
        patches = concatenated([image.pixel_values for image in images], weight)
        return patches, grids, to_device(positions, weight.device)


def mrope_position_ids(is_image: Tensor, image_grid_thw: Tensor, spatial_merge_size: int) -> Tensor:
    """Multimodal rotary positions of still images (section 2.1.3 of arXiv 2409.12191).

    Text advances all three positions together. An image's tokens share the position that comes next in time and count
    up from it by row and by column; the text behind goes on from their largest.

    is_image:       [S] bool
    image_grid_thw: [n, 3] patches of each image in time, height and width
    Returns [3, S] int64.
    """
    total = len(is_image)
    positions = torch.empty(3, total, dtype=torch.int64)
    done, following = 0, 0
    for time, height, width in image_grid_thw.tolist():
        rows, columns = height // spatial_merge_size, width // spatial_merge_size
        start = done + int(is_image[done:].int().argmax())
        stop = start + time * rows * columns
        positions[:, done:start] = torch.arange(following, following + start - done)
        following += start - done
        grid = torch.meshgrid(torch.arange(time), torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[:, start:stop] = following + torch.stack([axis.flatten() for axis in grid])
        following += max(rows, columns)
        done = stop
    positions[:, done:] = torch.arange(following, following + total - done)
    return positions


def tiny_tokenizer(spec: TinySpec):
    """A trained Qwen2Tokenizer, its files in the folder."""
    from transformers import Qwen2Tokenizer

    train_bpe(spec.texts, spec.vocab_size, SPECIAL_TOKENS).model.save(str(spec.folder))
    return Qwen2Tokenizer(
        vocab=str(spec.folder / "vocab.json"),
        merges=str(spec.folder / "merges.txt"),
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


def tiny_text_config(spec: TinySpec, tokenizer, **family: Any) -> dict[str, Any]:
    """text_config of the small model: what all have, the `family`'s own keys, and what `spec` replaces."""
    token_id = tokenizer.convert_tokens_to_ids
    return {
        **DECODER,
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 1e-6,
        "initializer_range": initial_std(spec.text.get("hidden_size", DECODER["hidden_size"])),
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": spec.tie_word_embeddings,
        **family,
        **spec.text,
    }


def tiny_token_ids(tokenizer) -> dict[str, int]:
    """The ids of media tokens that config.json names."""
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
