"""A mixed batch, its reference in transformers, and a loader of transformers' weights that is independent of ours."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from balcap_mega.models.families.qwen_vl import mrope_position_ids
from balcap_mega.models.policy import VisionLanguagePolicy
from balcap_mega.models.vision import VisionInputs
from balcap_mega.packing.assign import Piece
from balcap_mega.packing.build import PackingGroup, build_row
from balcap_mega.packing.rows import PackedRow
from balcap_mega.parallel.groups import process_grid

# Image sizes of each prompt (none: text only) and the lengths of its captions.
PROMPTS = (
    (((112, 84),), (7, 5, 9)),
    (((56, 168),), (6,)),
    (((84, 84), (140, 56)), (8, 4)),
    ((), (10,)),
    (((28, 28),), (3, 6)),
)
# Which captions of which prompt each row packs; a prompt's captions share its prefix.
ROWS = (
    (Piece(0, (0, 1)), Piece(1, (0,))),
    (Piece(2, (0, 1)),),
    (Piece(3, (0,)), Piece(4, (0, 1))),
    (Piece(0, (2,)),),
)


@dataclass(frozen=True)
class Case:
    """Prompts as transformers takes them (`inputs`), the same as the policy takes them, and packed rows of them."""

    inputs: list[dict[str, Tensor]]
    groups: list[PackingGroup]
    images: list[list[VisionInputs]]
    rows: list[PackedRow]

    def images_of(self, row: PackedRow) -> list[VisionInputs]:
        """The row's images in order of appearance."""
        return [image for prompt in row.images for image in self.images[prompt]]


def make_case(folder, *, pad_to: int = 4) -> Case:
    random = np.random.default_rng(0)
    processor = AutoProcessor.from_pretrained(folder)
    config = AutoModelForImageTextToText.from_pretrained(folder).config
    vocabulary = len(processor.tokenizer)
    inputs, groups, images, sequences = [], [], [], 0
    for sizes, lengths in PROMPTS:
        content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "Describe the shapes."}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
        prompt = dict(processor(text=[text], images=pictures or None, return_tensors="pt"))
        prompt.pop("attention_mask")
        tokens, grid = prompt["input_ids"][0], prompt.get("image_grid_thw")
        if grid is not None:
            positions = mrope_position_ids(tokens == config.image_token_id, grid, 2)
            patches = prompt["pixel_values"].split(grid.prod(1).tolist())
            images.append([VisionInputs(pixels, row[None]) for pixels, row in zip(patches, grid, strict=True)])
        else:
            positions = torch.arange(len(tokens)).repeat(3, 1)
            images.append([VisionInputs(pixels[None]) for pixels in prompt.get("pixel_values", ())])
        captions = [random.integers(10, vocabulary, length).tolist() for length in lengths]
        inputs.append(prompt)
        groups.append(PackingGroup(tokens.tolist(), positions, captions, sequences))
        sequences += len(captions)
    rows = [build_row(row, groups, pad_to=pad_to) for row in ROWS]
    return Case(inputs, groups, images, rows)


def reference_logits(model, case: Case) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(sequence number, [R, V] logits that predict its response, [R] response) of every caption, one by one."""
    for prompt, group in zip(case.inputs, case.groups, strict=True):
        for index, caption in enumerate(group.captions):
            response = torch.tensor(caption)
            extra = {}
            if "mm_token_type_ids" in prompt:
                padding = prompt["mm_token_type_ids"].new_zeros(1, len(caption))
                extra["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], padding], 1)
            tokens = torch.cat([prompt["input_ids"], response[None]], 1)
            logits = model(**{**prompt, "input_ids": tokens, **extra}).logits[0]
            yield group.first_sequence + index, logits[-len(caption) - 1 : -1], response


def reference_loss(model, case: Case) -> Tensor:
    """Mean cross-entropy over all response tokens."""
    losses = [
        torch.nn.functional.cross_entropy(logits, response, reduction="sum")
        for _, logits, response in reference_logits(model, case)
    ]
    return sum(losses) / sum(len(caption) for group in case.groups for caption in group.captions)


def load_reference(folder):
    """transformers' model, its norms and biases moved off 1 and 0, where mistakes in mapping them would not show."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def expected_shard(policy: VisionLanguagePolicy, name: str, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
    """What `parameter` of this rank holds when the whole model is `state`, transformers' state dict."""
    if name.startswith("vision."):
        return state["model." + name.removeprefix("vision.")]
    architecture, layout = policy.architecture, process_grid()
    if "word_embeddings" in name or "output_layer" in name:
        tied = architecture.tie_word_embeddings
        key = "model.language_model.embed_tokens.weight" if "word_embeddings" in name or tied else "lm_head.weight"
        padding = architecture.padded_vocab_size(layout.tensor_size) - architecture.vocab_size
        whole = torch.nn.functional.pad(state[key], (0, 0, 0, padding))
        return whole.chunk(layout.tensor_size)[layout.tensor_rank]
    if "final_layernorm" in name:
        return state["model.language_model.norm.weight"]
    _, _, _, local, block, *rest = name.split(".")
    layer = policy.language_model.decoder.layers[int(local)].layer_number - 1
    prefix = f"model.language_model.layers.{layer}."
    if block == "input_layernorm":
        return state[prefix + "input_layernorm.weight"]
    if block == "pre_mlp_layernorm":
        return state[prefix + "post_attention_layernorm.weight"]
    if rest[0] in ("q_layernorm", "k_layernorm"):
        return state[f"{prefix}self_attn.{rest[0][0]}_norm.weight"]
    cut = {"tensor": layout.tensor_size, "rank": layout.tensor_rank}
    if rest[0] == "linear_qkv":
        parts = [state[f"{prefix}self_attn.{part}_proj.{rest[1]}"] for part in "qkv"]
        heads = [part.unflatten(0, (architecture.num_kv_heads, -1)) for part in parts]
        return torch.cat(heads, dim=1).flatten(0, 1).chunk(cut["tensor"])[cut["rank"]]
    if rest[0] == "linear_fc1":
        parts = [state[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        return torch.cat([part.chunk(cut["tensor"])[cut["rank"]] for part in parts])
    key = {"linear_proj": "self_attn.o_proj.weight", "linear_fc2": "mlp.down_proj.weight"}[rest[0]]
    return state[prefix + key].chunk(cut["tensor"], dim=1)[cut["rank"]]


def load_state(policy: VisionLanguagePolicy, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(expected_shard(policy, name, parameter, state))
