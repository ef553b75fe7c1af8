"""What a dataset yields: one image, the prompt asked about it, and the caption it is compared with."""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class CaptionRecord:
    """One training or evaluation example.

    `units` are the atomic facts the reference states (the denominator of recall), where they are known in advance;
    a judge that needs them extracts them otherwise. Subclasses may carry more ground truth (see `scenes`).
    """

    id: str
    image: Image.Image
    prompt: str
    reference: str
    units: tuple[str, ...] | None = None


class CaptionDataset(Protocol):
    """A random-access set of records; decoding an image happens in `__getitem__`, never at construction."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CaptionRecord: ...
