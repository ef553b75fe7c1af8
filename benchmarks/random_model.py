"""Real-size policies with random weights, through the production loaders and without writing gigabytes to disk.

`write_random_model` leaves a Hugging Face folder whose safetensors file is one hole: zeros that take no space and are
read at the speed of memory. `randomise` then fills the learner's weights in place.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.tensors import huggingface_shapes
from balcap_mega.models.released import RELEASED
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.parallel.groups import process_grid
from balcap_mega.training.learner import Learner

TINY = "tiny"
MODELS = (*RELEASED, TINY)
TEXTS = ["A large red circle is to the left of a small blue square."]


def write_random_model(folder: Path, model: str, layers: int | None = None) -> Architecture:
    """A folder that the learner and vLLM load: `model` at its released sizes, with `layers` decoder layers if given.

    Its tokenizer knows a word for every id of the vocabulary, so whatever a random policy says is text.
    """
    released = next(iter(RELEASED.values())) if model == TINY else RELEASED[model]
    vision = {key: released["vision_config"][key] for key in ("image_size",) if key in released["vision_config"]}
    write_tiny_checkpoint(folder, released["model_type"], TEXTS, vision_config=vision)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if model != TINY:
        special = {key: value for key, value in config.items() if key.endswith(("_token_id", "_token_index"))}
        ends = {key: config["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = json.loads(json.dumps(released)) | special
        config.get("text_config", config).update(ends)
    text = config.get("text_config", config)
    if layers is not None:
        text["num_hidden_layers"] = min(layers, text.get("num_hidden_layers", layers))
        text.pop("layer_types", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    _fill_vocabulary(folder / "tokenizer.json", text["vocab_size"])
    architecture = Architecture.from_folder(folder)
    _write_hole(folder / "model.safetensors", huggingface_shapes(architecture))
    return architecture


def _fill_vocabulary(path: Path, size: int) -> None:
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    known = max([*vocabulary.values(), *(token["id"] for token in tokenizer["added_tokens"])]) + 1
    vocabulary |= {f"Ġword{number}": number for number in range(known, size)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _write_hole(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that no block of the disk holds."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + at)


def randomise(learner: Learner, seed: int = 0) -> None:
    """Fill the weights as at an initialisation, norms 1 and biases 0; alike on all ranks that hold the same ones."""
    tensor_rank = process_grid().tensor_rank
    with torch.no_grad():
        for number, (name, parameter) in enumerate(learner.policy.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            shard = 0 if name.startswith("vision.") else tensor_rank
            generator = torch.Generator(parameter.device).manual_seed(seed + 1000 * number + shard)
            parameter.normal_(0, min(0.02, parameter.shape[-1] ** -0.5), generator=generator)
    with learner.platform.megatron():
        learner.optimizer.reload_model_params()
