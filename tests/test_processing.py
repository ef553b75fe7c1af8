"""Prompts against transformers' own processor and its own rotary positions."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.families.qwen_vl import mrope_position_ids
from balcap_mega.models.processing import PromptProcessor


def record(height: int = 84, width: int = 140) -> CaptionRecord:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return CaptionRecord(id="0", image=Image.fromarray(pixels), prompt="Describe the image.", reference="A square.")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_is_what_transformers_reads(tiny_checkpoint, family):
    folder = tiny_checkpoint(family)
    prompt = PromptProcessor(folder)(record())
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": record().image}, {"type": "text", "text": "Describe the image."}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert list(prompt.prompt_token_ids) == expected["input_ids"][0].tolist()
    assert torch.equal(prompt.vision.pixel_values, expected["pixel_values"])
    if family == "llava":
        assert torch.equal(prompt.position_ids, torch.arange(len(prompt.prompt_token_ids)).repeat(3, 1))
    else:
        assert torch.equal(prompt.vision.image_grid_thw, expected["image_grid_thw"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_transformers(tiny_checkpoint, family):
    """Text, images of three shapes, text between some of them, text at the end."""
    folder = tiny_checkpoint(family)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder)).model
    grids = torch.tensor([[1, 4, 10], [1, 6, 6], [1, 12, 2]])
    pieces = [torch.zeros(5)]
    for index, grid in enumerate(grids):
        pieces += [torch.ones(int(grid.prod()) // 4), torch.zeros(1 + 3 * index)]
    is_image = torch.cat(pieces).bool()
    tokens = torch.where(is_image, model.config.image_token_id, 20)[None]
    expected, delta = model.get_rope_index(tokens, mm_token_type_ids=is_image[None].int(), image_grid_thw=grids)
    positions = mrope_position_ids(is_image, grids, 2)
    assert torch.equal(positions, expected[:, 0])
    # A caption goes on from the largest position + 1, which transformers calls the delta.
    assert int(positions.max()) + 1 == len(is_image) + int(delta)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens(tiny_checkpoint, family):
    processor = PromptProcessor(tiny_checkpoint(family))
    prompt = processor(record())
    placeholders = {token for token in prompt.prompt_token_ids if prompt.prompt_token_ids.count(token) > 10}
    assert placeholders <= set(processor.banned_token_ids)
    assert not set(processor.eos_token_ids) & set(processor.banned_token_ids)
    caption = processor.encode_caption("A large red circle.")
    assert caption[-1] == processor.eos_token_ids[0]


def test_folder_without_processor_is_refused(tmp_path):
    with pytest.raises(UserError, match="processor cannot be loaded"):
        PromptProcessor(tmp_path)
