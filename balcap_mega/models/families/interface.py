"""What a model family is to the rest of the program: one object, which alone knows what is particular to it.

Everything else asks the object that `Architecture.family` holds, and no other module knows a family's name. A new
family is a module beside this one and a line in `__init__.py`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from balcap_mega.models.huggingface.table import Table
from balcap_mega.models.vision import VisionInputs, VisionTower

Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Names and shapes of Hugging Face tensors."""


@dataclass(frozen=True)
class Decoder:
    """What a decoder computes, beyond its sizes.

    rotary_axes: [head_dim / 2], the position that each rotary frequency multiplies: 0 temporal, 1 height, 2 width.
                 Where a family has one position alone they are all 0, which is plain rotary
    qkv_bias:    the projections to queries, keys and values have biases
    qk_norm:     queries and keys are normalised head by head (RMSNorm) before they are rotated
    deepstack:   so many of the first layers are each followed by features of the image that are added at its places
                 (DeepStack, arXiv 2406.04334); the vision tower gives them
    """

    rotary_axes: tuple[int, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    deepstack: int = 0


@dataclass(frozen=True)
class TinySpec:
    """A small random checkpoint to write: `text` and `vision` replace single keys of the family's small sizes."""

    folder: Path
    texts: list[str]
    vocab_size: int
    tie_word_embeddings: bool
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)


class Family(ABC):
    """One family, at every size of it. `config` is always the whole model's transformers config.

    name:            `model_type` in config.json, and what `model.tiny` asks for
    title:           as its authors write it
    text_models:     which `model_type` its text_config may have
    decoder_prefix:  what the decoder's tensors are called before `layers.0...`, in the released checkpoints
    head:            their tensor of the LM head, where it is not tied to the embedding
    renamed:         (pattern, replacement) from what other versions of transformers called tensors to those names
    vision_modules:  the modules, by vLLM's names, of the vision tower and of what projects it
    vision_data_parallel: vLLM gives whole images to single ranks instead of cutting the tower over them
    media_tokens:    special tokens that no caption may hold, beside the media tokens that config.json names
    padding_processor: transformers' image processor that lays pictures on a square, for a family that sees squares
    released:        config.json of the released checkpoints, by name, as on the Hugging Face hub
    """

    name: ClassVar[str]
    title: ClassVar[str]
    text_models: ClassVar[tuple[str, ...]]
    decoder_prefix: ClassVar[str]
    head: ClassVar[str]
    renamed: ClassVar[tuple[tuple[str, str], ...]]
    vision_modules: ClassVar[tuple[str, ...]]
    vision_data_parallel: ClassVar[bool] = False
    media_tokens: ClassVar[tuple[str, ...]] = ()
    padding_processor: ClassVar[str | None] = None
    released: ClassVar[Mapping[str, dict[str, Any]]]

    # What config.json says.

    @abstractmethod
    def decoder(self, config: PretrainedConfig) -> Decoder:
        """What the decoder computes."""

    def requirements(self, config: PretrainedConfig) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """key -> (its value, the values that are computed rightly): what released checkpoints never differ in."""
        return {}

    # Pictures: from the processor's output to embeddings.

    @abstractmethod
    def images(self, inputs: Mapping[str, Any]) -> list[VisionInputs]:
        """What the Hugging Face processor made of a batch of prompts with one image each, image by image."""

    @abstractmethod
    def image_grid(self, image_processor: Any, size: tuple[int, int]) -> Tensor | None:
        """`VisionInputs.image_grid_thw` of a picture of `size` (width, height), without its pixels."""

    @abstractmethod
    def position_ids(self, config: PretrainedConfig, token_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """[3, S] int64 rotary positions of [S] tokens that hold the images of `image_grid_thw` ([n, 3], or None)."""

    @abstractmethod
    def vision_tower(self, config: PretrainedConfig) -> VisionTower:
        """The tower and what projects it, not yet read; its parameters go by `vision_parameter`, less "vision."."""

    # Weights: one table for import, export and refit.

    @abstractmethod
    def vision_shapes(self, config: PretrainedConfig) -> Shapes:
        """Every tensor of the vision tower and what projects it, by the released checkpoints' names."""

    def vision_parameter(self, name: str) -> str:
        """The policy's parameter that holds the whole tensor `name` of `vision_shapes`."""
        return f"vision.{name}"

    @abstractmethod
    def vllm_vision(self, config: PretrainedConfig, table: Table) -> None:
        """Place those tensors in the parameters of vLLM's model."""

    def canonical_name(self, name: str) -> str:
        """The released checkpoints' name of a tensor that some version of transformers calls `name`."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    # What the planner counts.

    @abstractmethod
    def image_tokens(self, config: PretrainedConfig) -> int:
        """Embeddings of an image where nothing was measured: of the one size, or of about a megapixel."""

    @abstractmethod
    def picture(
        self, config: PretrainedConfig, image_tokens: int
    ) -> tuple[tuple[int, ...], tuple[int, int, int] | None]:
        """The shapes of a picture of that many embeddings: of `VisionInputs.pixel_values`, and its `image_grid_thw`."""

    @abstractmethod
    def vision_flops(self, config: PretrainedConfig, image_tokens: int) -> float:
        """Forward, for one image of that many embeddings; a multiply-add is two."""

    # Small checkpoints for tests and the quickstart.

    @abstractmethod
    def write_tiny(self, spec: TinySpec) -> None:
        """Write config, weights, tokenizer and processor of a random small model. torch's generator is seeded."""
