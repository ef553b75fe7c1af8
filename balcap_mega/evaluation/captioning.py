"""Captions of a checkpoint for a set of images, by the engine that training uses."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from balcap_mega.config.schema import RolloutConfig
from balcap_mega.data.records import CaptionRecord, refuse_placeholders
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.requests import RolloutRequest

AT_ONCE = 128  # images handed to the engine together, and captions lost at most by an interruption


def caption_images(
    model: str | Path, pictures: Pictures, names: Mapping[str, str], prompt: str, max_tokens: int, max_model_len: int
) -> Iterator[dict[str, str]]:
    """Greedy captions of the pictures `names` (by a key of the caller's), as batches of {key: caption}.

    Raises UserError for a prompt that spells an image's placeholder.
    """
    refuse_placeholders(prompt, "--caption-prompt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = RolloutConfig(max_tokens=max_tokens, max_model_len=max_model_len, timeout_seconds=3600)
    engine = RolloutEngine(model, config, device=device, dtype=dtype, seed=0)
    keys = list(names)
    for start in range(0, len(keys), AT_ONCE):
        batch = keys[start : start + AT_ONCE]
        records = [CaptionRecord(key, pictures.read(names[key]), prompt, reference="") for key in batch]
        groups = engine.greedy([RolloutRequest(place, record, place) for place, record in enumerate(records)])
        yield {batch[group.place]: group.rollouts[0].text.strip() for group in groups}
