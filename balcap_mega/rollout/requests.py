"""What a rollout engine is asked: a record to caption, rendered or not yet."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from balcap_mega.data.records import CaptionRecord


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as vLLM's engine core takes it, its image processed.

    tokens: of the prompt, image included
    nbytes: of the image's tensors
    """

    inputs: Any
    tokens: int
    nbytes: int


@dataclass(frozen=True)
class RolloutRequest:
    """A record to caption.

    place:        in its step, or among all that are captioned together
    record_index: in its dataset
    repeat:       how many earlier places of the step have the same record
    rendered:     what `RolloutEngine.render` made of the record, where that was done before
    """

    place: int
    record: CaptionRecord
    record_index: int
    repeat: int = 0
    rendered: RenderedPrompt | None = field(default=None, compare=False, repr=False)


def request_seed(seed: int, step: int, record_index: int, repeat: int = 0) -> int:
    """A 62-bit seed for one prompt of one step; vLLM adds the rollout's number to it."""
    name = f"{seed}/{step}/{record_index}" + (f"/{repeat}" if repeat else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
