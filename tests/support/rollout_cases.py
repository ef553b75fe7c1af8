"""What the engine's and the refit's tests share: prompts with images, and transformers' logprobs of the same tokens."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from balcap_mega.data.records import CaptionRecord
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.requests import RolloutRequest
from balcap_mega.rollout.rollouts import RolloutGroup

SIZES = [(112, 140), (84, 84), (140, 112), (56, 168), (112, 112), (84, 112)]


def make_prompts(count: int) -> list[RolloutRequest]:
    """Random pictures of several sizes; record indices that are no positions."""
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (*SIZES[n % len(SIZES)], 3), np.uint8)) for n in range(count)]
    return [
        RolloutRequest(n, CaptionRecord(str(n), picture, "Describe the shapes.", ""), record_index=100 + 7 * n)
        for n, picture in enumerate(pictures)
    ]


@torch.no_grad()
def reference_logits(model, folder, engine: RolloutEngine, prompt: RolloutRequest, group: RolloutGroup) -> list[Tensor]:
    """transformers' [R, V] logits that predict each of the group's captions. The prompt's tokens must be the same."""
    text = engine.processor.prompt_text(prompt.record.prompt)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = dict(processor(text=[text], images=[prompt.record.image], return_tensors="pt"))
    assert tuple(inputs["input_ids"][0].tolist()) == group.prompt_token_ids
    inputs.pop("attention_mask")
    logits = []
    for rollout in group.rollouts:
        caption = torch.tensor([rollout.token_ids])
        longer = {"input_ids": torch.cat([inputs["input_ids"], caption], 1)}
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(caption)], 1)
        logits.append(model(**(inputs | longer)).logits[0, -len(rollout.token_ids) - 1 : -1])
    return logits


def largest_difference(
    model, folder, engine: RolloutEngine, prompts: list[RolloutRequest], groups: list[RolloutGroup]
) -> float:
    """Between the engine's logprobs and those of softmax(logits / temperature) by transformers, over all tokens."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.seen.index == prompt.record_index
        for rollout, logits in zip(group.rollouts, reference_logits(model, folder, engine, prompt, group), strict=True):
            expected = (logits / engine.config.temperature).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            worst = max(worst, (expected - torch.tensor(rollout.logprobs)).abs().max().item())
    return worst
