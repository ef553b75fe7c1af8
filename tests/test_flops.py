"""Model FLOPs against PyTorch's own count of transformers' models; what a step says of its speed; GPUs' peaks."""

from dataclasses import replace

import pytest
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.flops import TokenWork, generation_flops, group_work, update_flops, vision_forward
from balcap_mega.parallel.peaks import peak_of
from balcap_mega.planning.published import text_model
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.observe.speed import TOKENS, Sampled, Speed

RESPONSES = 7


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_that_pytorch_counts_in_transformers(family, tiny_checkpoint):
    folder = tiny_checkpoint(family)
    architecture = Architecture.from_folder(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    )
    inputs = processor(images=[Image.new("RGB", (112, 112))], text=[text], return_tensors="pt")
    if family == "llava":  # transformers runs the tower's last layer too, whose result LLaVA does not use
        model.config.vision_feature_layer = model.model.config.vision_feature_layer = -1
        del model.model.vision_tower.encoder.layers[-1:]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    with FlopCounterMode(display=False) as forward:
        logits = model(**inputs, logits_to_keep=RESPONSES).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    tokens = inputs["input_ids"].shape[1]
    image = vision_forward(architecture, int((inputs["input_ids"] == architecture.image_token_id).sum()))
    work = TokenWork(tokens, tokens**2, RESPONSES)  # eager attention computes what its mask then hides
    assert generation_flops(architecture, work, image) == pytest.approx(forward.get_total_flops(), rel=0.01)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert update_flops(architecture, work, image) == pytest.approx(both, rel=0.01)


def test_a_group_counts_its_prompt_once_and_no_token_that_predicts_nothing():
    pairs = sum(range(1, 6)) + (6 + 7) + 6  # the prompt's five; then two tokens that see it and each other; then one
    assert group_work(5, (3, 2, 1, 0)) == TokenWork(tokens=5 + 2 + 1, pairs=pairs, responses=6)


def group(prompt: int, captions: tuple[int, ...]) -> RolloutGroup:
    rollouts = tuple(Rollout((9,) * length, (-1.0,) * length, "", True) for length in captions)
    return RolloutGroup(0, (1,) * prompt, rollouts, SeenRecord(0, "a", "", "rank 0"))


def test_speed_of_a_step():
    # One layer: 8·8·4 for attention, 3·8·16 for the MLP; a head of 8·10; two attention heads of 4.
    model = replace(text_model(1, 8, 16, 2, 2, 10), head_dim=4)
    speed = Speed(model, world=2, trains_vision=False, update_peak=1e4, rollout_peak=1e3)
    groups, seconds = [group(5, (3, 2, 1)), group(2, (1,))], {"rollout": 2.0, "update": 4.0, "refit": 2.0}
    metrics = speed.metrics(groups, Sampled(tokens=12, flops=8e3), seconds)
    assert {name.removeprefix(f"{TOKENS}/"): value for name, value in metrics.items() if name.startswith(TOKENS)} == {
        "sample": (3 * 5 + 6 + 2 + 1) / 8 / 2,
        "response": 7 / 8 / 2,
        "rollout": 12 / 2 / 2,
        "update": (5 + 2 + 1 + 2) / 4 / 2,
    }
    forward = 2 * 10 * (8 * 8 * 4 + 3 * 8 * 16) + 4 * 2 * 4 * (34 + 3) + 2 * 7 * 8 * 10
    assert metrics["mfu/update"] == pytest.approx(3 * forward / 1e4 / 4 / 2)
    assert metrics["mfu/step"] == pytest.approx((3 * forward / 1e4 + 8e3 / 1e3) / 8 / 2)
    unknown = replace(speed, rollout_peak=None).metrics(groups, Sampled(12, 8e3), seconds)
    assert not [name for name in unknown if name.startswith("mfu/")], "no share of a peak that is not known"


def test_peaks_are_of_the_gpu_that_it_is():
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") and peak_of("NVIDIA H200").of("fp8") == 1978.9e12
    assert peak_of("NVIDIA H100 PCIe").of("bfloat16") < peak_of("NVIDIA H100 NVL").of("bfloat16") < 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB").of("fp8") is None is peak_of("NVIDIA H100 PCIe").of("float32")
    assert peak_of("Tesla T4") is None
