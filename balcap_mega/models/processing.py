"""From a caption record to what the policy and the engine read, by the checkpoint's own Hugging Face processor."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.squares import pad_to_square, seen_share
from balcap_mega.models.torchvision_operators import declare_torchvision_operators
from balcap_mega.models.vision import VisionInputs


@dataclass(frozen=True)
class ProcessedPrompt:
    """One prompt with its image.

    prompt_token_ids: [P], image tokens expanded, generation prompt included
    position_ids:     [3, P] int64 rotary positions (temporal, height, width); a caption's tokens go on from their
                      largest value + 1, equal in all three
    vision:           the image as the vision tower takes it; `PromptProcessor.without_pixels` leaves them out
    """

    prompt_token_ids: tuple[int, ...]
    position_ids: Tensor
    vision: VisionInputs

    @property
    def nbytes(self) -> int:
        return self.vision.pixel_values.nbytes


class _GenerationConfig(BaseModel):
    eos_token_id: int | list[int] | None = None


class PromptProcessor:
    """Chat template, image preprocessing and tokenizer of the checkpoint in `folder`.

    eos_token_ids:    any of these ends a caption; the first is the one that supervised targets end with
    banned_token_ids: media placeholders, which a caption must not hold: they would ask for an image's embeddings
    pad_to_square: lay pictures on a square, for the engine and the trainer alike, where the image processor would cut
        out their centre. UserError for a model that sees whole pictures anyway.

    Several threads may share it.
    """

    def __init__(self, folder: str | Path, *, pad_to_square: bool = False):
        declare_torchvision_operators()
        self.folder = folder
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises nothing narrower for a file of its own that it cannot read
            raise UserError(
                f"model.path={folder}: its processor cannot be loaded ({error})",
                remedy="the folder needs the tokenizer and preprocessor files that the checkpoint was published with",
            ) from error
        self._config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._family = FAMILIES[self._config.model_type]
        self._tokenizer = self._processor.tokenizer
        # What splits special tokens is a setting of a tokenizer, not of a call: one for prompts, one for other texts.
        self._text_tokenizer = copy.deepcopy(self._tokenizer)
        self._text_lengths: dict[str, int] = {}  # of prompts as rendered; a dataset has few that differ
        self._pads = pad_to_square
        if pad_to_square and self.seen_share((2, 1), as_it_is=True) == 1:
            raise UserError(
                f"data.pad_to_square=true, but {self._config.model_type} in {folder} sees whole pictures of any shape",
                remedy="set data.pad_to_square=false",
            )
        self.eos_token_ids = _eos_token_ids(Path(folder), self._tokenizer.eos_token_id)
        self.banned_token_ids = self._media_token_ids()

    def __call__(self, record: CaptionRecord) -> ProcessedPrompt:
        """Tokens, positions and pixels of the record's prompt."""
        return self.many([record])[0]

    def many(self, records: Sequence[CaptionRecord]) -> list[ProcessedPrompt]:
        """The same for several records in one call of the processor, whose own work is most of the time."""
        inputs = self._processor(
            text=[self.prompt_text(record.prompt) for record in records],
            images=[self._picture(record) for record in records],
        )
        images = self._family.images(inputs)
        token_ids = [torch.tensor(row) for row in inputs["input_ids"]]
        return [
            ProcessedPrompt(tuple(row.tolist()), self.position_ids(row, image.image_grid_thw), image)
            for row, image in zip(token_ids, images, strict=True)
        ]

    def without_pixels(self, token_ids: Sequence[int], size: tuple[int, int]) -> ProcessedPrompt:
        """A prompt that was processed elsewhere, about a picture of `size` (width, height): all but the pixels."""
        if self._pads:
            size = (max(size), max(size))
        grid = self._family.image_grid(self._processor.image_processor, size)
        return ProcessedPrompt(
            tuple(token_ids), self.position_ids(torch.tensor(token_ids), grid), VisionInputs.without_pixels(grid)
        )

    def image_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of a prompt's tokens stand for its image."""
        return token_ids.count(self._config.image_token_id)

    def prompt_text(self, prompt: str) -> str:
        """The chat template's text with one unexpanded image placeholder: what vLLM is given beside the image."""
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        return self._processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    def prompt_length(self, prompt: str, size: tuple[int, int]) -> int:
        """Tokens of a prompt about a picture of `size` (width, height), which need not be decoded for it."""
        if prompt not in self._text_lengths:
            self._text_lengths[prompt] = len(self._tokenizer(self.prompt_text(prompt)).input_ids)
        counts = self._processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])  # what vLLM reckons with, too
        return self._text_lengths[prompt] - 1 + counts.num_image_tokens[0]

    def check(self, record: CaptionRecord) -> int:
        """Render and process one prompt as a run does; return its number of tokens.

        Raises UserError for a chat template that is absent, fails, or makes no prompt with one image and its text.
        """
        where = f"model.path={self.folder}"
        remedy = "save the processor there that the model was published with, its chat template takes images"
        if self._processor.chat_template is None:
            raise UserError(f"{where} holds no chat template (chat_template.jinja)", remedy=remedy)
        try:
            text = self.prompt_text(record.prompt)
        except Exception as error:  # a template is a program, and raises what it likes
            raise UserError(
                f"{where}: its chat template fails on an image and a text ({type(error).__name__}: {error})",
                remedy=remedy,
            ) from error
        images = text.count(self._processor.image_token)
        if images != 1 or record.prompt not in text:
            problem = f"makes {images} images" if images != 1 else "leaves the text out"
            raise UserError(f"{where}: its chat template {problem} of a message of one image and a text", remedy=remedy)
        return len(self(record).prompt_token_ids)

    def engine_prompt(self, record: CaptionRecord) -> dict[str, Any]:
        """The record as a vLLM prompt; the engine expands the image tokens itself."""
        return {
            "prompt": self.prompt_text(record.prompt),
            "multi_modal_data": {"image": self._picture(record)},
        }

    def seen_share(self, size: tuple[int, int], *, as_it_is: bool = False) -> float:
        """The share of a picture of `size` that the model sees; with `as_it_is`, of one that was not padded."""
        return 1.0 if self._pads and not as_it_is else seen_share(self._processor.image_processor, size)

    def _picture(self, record: CaptionRecord) -> Image.Image:
        image = record.image.convert("RGB")
        return pad_to_square(image, self._processor.image_processor) if self._pads else image

    def position_ids(self, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """[3, S] rotary positions of [S] tokens holding the images of `image_grid_thw` ([n, 3], or None)."""
        return self._family.position_ids(self._config, token_ids, image_grid_thw)

    def encode_caption(self, caption: str) -> tuple[int, ...]:
        """A supervised target: the caption's tokens and the end-of-sequence token.

        A special token that the caption spells, such as an image's placeholder, is text like any other.
        """
        return (*self._text_token_ids(caption), self.eos_token_ids[0])

    def decode_caption(self, token_ids: Sequence[int]) -> str:
        """A sampled caption's text, special tokens left out."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def count_tokens(self, text: str) -> float:
        """Length of a text in tokens, special ones left out."""
        return float(len(self._text_token_ids(text)))

    def _text_token_ids(self, text: str) -> list[int]:
        return self._text_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def _media_token_ids(self) -> tuple[int, ...]:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {getattr(self._config, name, None) for name in names} - {None}
        vocabulary = self._tokenizer.get_vocab()
        return tuple(sorted(ids | {vocabulary[token] for token in self._family.media_tokens if token in vocabulary}))


def _eos_token_ids(folder: Path, tokenizer_eos: int) -> tuple[int, ...]:
    """The tokenizer's end token and whatever else the checkpoint's generation_config.json stops at, as vLLM does."""
    path = folder / "generation_config.json"
    try:
        configured = _GenerationConfig.model_validate_json(path.read_bytes()).eos_token_id if path.is_file() else None
    except ValidationError as error:
        raise UserError(f"{path} is malformed ({error.errors()[0]['msg']})", remedy="download it again") from error
    others = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(dict.fromkeys([tokenizer_eos, *others]))
