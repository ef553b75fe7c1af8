"""Vision towers against transformers' own, and how images are shared out over tensor-parallel ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families.llava import LlavaVisionTower
from balcap_mega.models.families.qwen2_5_vl import Qwen2_5_VisionTower
from balcap_mega.models.policy import build_vision_tower
from balcap_mega.models.vision import VisionInputs, share_out

GRIDS = ((1, 10, 26), (1, 16, 16), (1, 22, 8), (1, 2, 4))  # whole windows are 8 x 8 patches; the others are cut


def test_windows_batched_by_length_change_nothing(tiny_checkpoint):
    folder = tiny_checkpoint("qwen2_5_vl")
    expected_tower = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.visual
    tower = Qwen2_5_VisionTower(AutoConfig.from_pretrained(folder))
    tower.visual.load_state_dict(expected_tower.state_dict())
    images = [VisionInputs(torch.randn(t * h * w, 1176), torch.tensor([[t, h, w]])) for t, h, w in GRIDS]
    embeddings = tower(images)
    pixels = torch.cat([image.pixel_values for image in images])
    expected = expected_tower(pixels, grid_thw=torch.tensor(GRIDS)).pooler_output
    assert [tower.token_count(image) for image in images] == [t * h * w // 4 for t, h, w in GRIDS]
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)
    weight, expected_weight = tower.visual.patch_embed.proj.weight, expected_tower.patch_embed.proj.weight
    embeddings.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected_weight.grad, rtol=1e-4, atol=1e-6)


def test_bfloat16_rounds_weights_but_not_positions(tiny_checkpoint):
    folder = tiny_checkpoint("qwen2_5_vl")
    expected_tower = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).model.visual
    tower = build_vision_tower(Architecture.from_folder(folder), torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    for name, buffer in tower.visual.named_buffers():
        assert torch.equal(buffer, expected_tower.get_buffer(name)), name


def test_clip_stops_at_the_feature_layer(tiny_checkpoint):
    folder = tiny_checkpoint("llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model
    tower = LlavaVisionTower(model.config)
    tower.load_state_dict({name: value for name, value in model.state_dict().items() if "language_model" not in name})
    pixels = torch.randn(3, 3, 112, 112)
    expected = model.get_image_features(pixels, return_dict=True).pooler_output
    embeddings = tower([VisionInputs(image[None]) for image in pixels])
    torch.testing.assert_close(embeddings, torch.cat(expected), atol=1e-6, rtol=0)
    embeddings.sum().backward()
    never_run = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
    assert never_run == [name for name, parameter in tower.named_parameters() if not parameter.requires_grad]


@given(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 8))
def test_images_are_shared_out_evenly(costs, ranks):
    shares = share_out(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
