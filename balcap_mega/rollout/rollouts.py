"""The result of the rollout stage: G sampled captions of each prompt, with the engine's logprobs."""

from dataclasses import dataclass, field

from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.parallel.host import this_rank


@dataclass(frozen=True)
class Rollout:
    """One sampled caption.

    token_ids: response tokens, the end-of-sequence token included when `finished`
    logprobs:  one float a token, of softmax(logits / temperature) over the whole vocabulary, before bans and top_p
    text:      decoded without special tokens
    finished:  False when generation was cut at the token limit
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool


@dataclass(frozen=True)
class SeenRecord:
    """Identifies a record as one rank loaded it, so that ranks can compare what they loaded.

    index:  of the record in the dataset, the same on all ranks
    id:     `CaptionRecord.id`; of another record if the dataset replaced one whose picture is corrupt
    pixels: `CaptionRecord.pixels`, a digest
    by:     the rank that loaded it, and its host
    size:   of the picture, (width, height); None where it was not kept, as in a step's record
    """

    index: int
    id: str
    pixels: str
    by: str
    size: tuple[int, int] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, index: int, record: CaptionRecord) -> "SeenRecord":
        return cls(index, record.id, record.pixels, this_rank(), record.image.size)

    def refuse_unlike(self, other: "SeenRecord") -> None:
        """Raise UserError, naming both hosts, unless `other` is the same record with the same pixels."""
        if self.id == other.id and self.pixels == other.pixels:
            return
        same = self.id == other.id
        what = f"{self.id!r} with other pixels" if same else f"{self.id!r} here and {other.id!r} there"
        raise UserError(
            f"{self.by} and {other.by} do not load the same data: record {self.index} is {what}",
            remedy="copy annotations and images from one host to the other (torchrun launch/doctor.py compares them)",
        )


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of the prompt at `place` in its step, and the record that the engine saw."""

    place: int
    prompt_token_ids: tuple[int, ...]  # image tokens expanded, exactly as the engine saw them
    rollouts: tuple[Rollout, ...]
    seen: SeenRecord
