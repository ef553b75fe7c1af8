"""What a dataset yields: one image, the prompt asked about it, and the caption it is compared with."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from PIL import Image

from balcap_mega.data.questions import ChoiceQuestion
from balcap_mega.errors import UserError

# What stands for an image in the chat templates of both families; in a prompt it would ask for one more.
PLACEHOLDERS = ("<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")


@dataclass(frozen=True)
class CaptionRecord:
    """One training or evaluation example.

    `units` are the atomic facts the reference states (the denominator of recall), where they are known in advance;
    a judge that needs them extracts them otherwise. `questions` are what the reward `utility` asks; without them it is
    missing. Subclasses may carry more ground truth (see `scenes`).
    """

    id: str
    image: Image.Image
    prompt: str
    reference: str
    units: tuple[str, ...] | None = None
    questions: tuple[ChoiceQuestion, ...] | None = None

    @cached_property
    def pixels(self) -> str:
        """A digest of the picture as RGB, size included: alike where two hosts decoded the same pixels."""
        image = self.image.convert("RGB")
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


class CaptionDataset(Protocol):
    """A random-access set of records; decoding an image happens in `__getitem__`, never at construction."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionRecord: ...

    def digest(self) -> str:
        """Of all that the records hold but the pixels, in their order."""
        ...


def refuse_placeholders(prompt: str, where: str) -> None:
    """Raise UserError, naming `where` the prompt stands, for one that spells a token that stands for an image."""
    for placeholder in PLACEHOLDERS:
        if placeholder in prompt:
            raise UserError(
                f"{where}: the prompt holds {placeholder}, which stands for an image",
                remedy="leave it out: the model's chat template puts it where it belongs",
            )
