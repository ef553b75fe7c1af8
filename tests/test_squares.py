"""LLaVA sees whole pictures where it is told to: padded as its own training did, by engine and trainer alike."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.families.llava import Llava
from balcap_mega.models.huggingface.transfer import _copy_companions
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.models.squares import pad_to_square
from balcap_mega.models.torchvision_operators import declare_torchvision_operators


def objects_at_both_sides(size=(64, 48)) -> CaptionRecord:
    """A white picture whose first and last columns are black: 4:3, so that its centre square shows neither."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    pixels[:, :6] = pixels[:, -6:] = 0
    return CaptionRecord("0", Image.fromarray(pixels), "Describe.", "Two bars.")


def test_a_padded_picture_shows_what_the_crop_hides_to_engine_and_trainer(tiny_checkpoint):
    folder, record = tiny_checkpoint("llava"), objects_at_both_sides()
    cropped, padded = PromptProcessor(folder), PromptProcessor(folder, pad_to_square=True)
    darkest = {name: p(record).vision.pixel_values.min() for name, p in (("crop", cropped), ("pad", padded))}
    assert darkest["crop"] > 1 and darkest["pad"] < -1  # normalised: white is about 2, black about -1.8
    assert cropped.seen_share((64, 48)) == pytest.approx(0.75) and padded.seen_share((64, 48)) == 1
    assert cropped.engine_prompt(record)["multi_modal_data"]["image"].size == (64, 48)
    # The engine hands its picture to the same processor: what it then sees is what the trainer sees.
    engines = padded.engine_prompt(record)["multi_modal_data"]["image"]
    again = CaptionRecord("0", engines, record.prompt, record.reference)
    assert torch.equal(cropped(again).vision.pixel_values, padded(record).vision.pixel_values)


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (63, 48), (30, 30)])
def test_padding_is_transformers_own_for_llava(size):
    declare_torchvision_operators()
    from transformers.models.llava.image_processing_llava import LlavaImageProcessor

    steps = dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    theirs = LlavaImageProcessor(do_pad=True, **steps)
    image = objects_at_both_sides(size).image
    ours = np.asarray(pad_to_square(image, theirs)).astype(int)
    expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    assert np.abs(ours - expected).max() <= 1  # of the ground's colour, which they do not round down


def test_a_policy_of_padded_pictures_is_exported_with_a_processor_that_pads(tiny_checkpoint, tmp_path):
    """Read by transformers alone, the exported folder yields the pixels that the policy was trained on."""
    source, folder = tiny_checkpoint("llava"), tmp_path / "exported"
    folder.mkdir()
    _copy_companions(source, folder, torch.float32, Llava.padding_processor)
    record = objects_at_both_sides()
    trained_on = PromptProcessor(source, pad_to_square=True)(record).vision.pixel_values
    inputs = AutoProcessor.from_pretrained(folder)(images=record.image, text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == trained_on.shape
    assert (inputs["pixel_values"] - trained_on).abs().max() < 0.02  # 1/255 of the ground's colour, normalised
    assert PromptProcessor(folder).seen_share((64, 48)) == 1
    _copy_companions(source, folder, torch.float32)
    assert PromptProcessor(folder).seen_share((64, 48)) == pytest.approx(0.75)


def test_a_model_that_sees_whole_pictures_needs_none(tiny_checkpoint):
    folder = tiny_checkpoint("qwen2_5_vl")
    assert PromptProcessor(folder).seen_share((400, 30)) == 1
    with pytest.raises(UserError, match="pad_to_square"):
        PromptProcessor(folder, pad_to_square=True)
