"""A dataset of image files and their captions: rows in memory, pictures read when a record is asked for."""

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.headers import Unreadable, picture_size
from balcap_mega.data.image_files import MOST_BYTES, image_bytes, present_files, refuse_all_outside
from balcap_mega.data.images import ImageDecoder, PilDecoder, shrink, why_unreadable
from balcap_mega.data.inputs import digest_of
from balcap_mega.data.questions import ChoiceQuestion
from balcap_mega.data.records import CaptionRecord, refuse_placeholders
from balcap_mega.errors import UserError

log = logging.getLogger(__name__)

HEAD_BYTES = 2**16  # of an image file, in which its header mostly lies


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One annotation. `image` is a path below the dataset's image root, or the name of an embedded picture."""

    id: str
    image: str
    prompt: str
    reference: str
    units: tuple[str, ...] | None = None
    questions: tuple[ChoiceQuestion, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """What reading one record came to, before it counts (`ImageFileDataset.take`).

    record:     None where no picture was found that can be read
    unreadable: the rows whose pictures could not be read on the way there, and what is wrong with each
    """

    record: CaptionRecord | None
    unreadable: Mapping[int, str]


class EmbeddedImages(Protocol):
    """Pictures that lie in the annotations' own files."""

    def __contains__(self, image: str) -> bool: ...

    def read(self, image: str) -> bytes:
        """Raises Unreadable."""
        ...


class ImageFileDataset:
    """Records of those rows whose image file is there, in the rows' order.

    A picture that cannot be read is replaced by the next sound one, the same on every rank, and the log says why.
    missing, corrupt: how many rows were left out so far, and how many replaced; more than `max_missing_fraction` of
    all rows raises UserError, at construction or on the access that meets one too many.
    absent: the images that rows name and that are not there, in order
    together: how many pictures the decoder is best given at a time
    """

    def __init__(
        self,
        rows: Sequence[ImageRow | LeftOut],
        image_root: str | Path,
        *,
        embedded: EmbeddedImages | None = None,
        decode: ImageDecoder | None = None,
        max_pixels: int | None = None,
        max_missing_fraction: float = 0.01,
        together: int = 1,
    ):
        self.root = Path(image_root)
        total, left_out = len(rows), [row for row in rows if isinstance(row, LeftOut)]
        rows = [row for row in rows if isinstance(row, ImageRow)]
        inside = {row.image for row in rows if row.image in embedded} if embedded is not None else set()
        refuse_all_outside((row.image, f"row {row.id!r}") for row in rows if row.image not in inside)
        for row in rows:
            refuse_placeholders(row.prompt, f"row {row.id!r}")
        present = inside | present_files(self.root, {row.image for row in rows} - inside)
        self.rows = [row for row in rows if row.image in present]
        self.missing = total - len(self.rows)
        self.absent = tuple(sorted({row.image for row in rows} - present))
        self._total = total
        self._embedded = embedded
        self._decode = decode or PilDecoder()
        self.together = together
        self._max_pixels = max_pixels
        self._max_missing_fraction = max_missing_fraction
        self._corrupt: set[int] = set()
        # Why a row was left out, one for all: the last picture that could not be read, or the first annotation.
        self._reason = str(left_out[0]) if left_out else ""
        if left_out:
            log.warning("%d of %d rows are left out, e.g. %s", len(left_out), total, left_out[0])
        if self.absent:
            count, example = len(rows) - len(self.rows), self.absent[0]
            log.warning("%d of %d images are missing below %s, e.g. %r", count, total, self.root, example)
        self._refuse_too_many()
        if not self.rows:
            raise UserError(
                f"no row of the dataset has an image below {self.root}",
                remedy="check data.path and data.image_root",
            )

    @property
    def corrupt(self) -> int:
        return len(self._corrupt)

    @property
    def unasked(self) -> int:
        """Rows without questions."""
        return sum(not row.questions for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CaptionRecord:
        return self.load([index])[0]

    def load(self, indices: Sequence[int]) -> list[CaptionRecord]:
        """The records of `indices`, their pictures decoded as one batch."""
        return [self.take(reading) for reading in self.read(indices)]

    def read(self, indices: Sequence[int]) -> list[Reading]:
        """The same, with nothing counted, logged or refused yet: any thread may call it, long before it is needed."""
        for index in indices:
            if not 0 <= index < len(self.rows):
                raise IndexError(f"record {index} of a dataset of {len(self.rows)}")
        pictures = self._decode([self._read(index) for index in indices])
        return [
            self._next_sound(index) if picture is None else Reading(self._record(index, picture), {})
            for index, picture in zip(indices, pictures)
        ]

    def take(self, reading: Reading) -> CaptionRecord:
        """The record that was read; pictures that could not be are logged and counted, each once.

        Raises UserError for one too many of them.
        """
        for index, reason in reading.unreadable.items():
            if index not in self._corrupt:
                self._corrupt.add(index)
                self._reason = f"{str(self.root / self.rows[index].image)!r} {reason}"
                log.warning("%s; the next image takes its place", self._reason)
                self._refuse_too_many()
        if reading.record is None:
            self._refuse_too_many()
            raise UserError(
                f"no image below {self.root} can be decoded, e.g. {self._reason}", remedy="replace the images"
            )
        return reading.record

    def digest(self) -> str:
        return digest_of(
            (row.id, row.image, row.prompt, row.reference, row.units, *_plain(row.questions)) for row in self.rows
        )

    def is_sound(self, index: int) -> bool:
        """Whether the picture of row `index` can be decoded."""
        return self._decode([self._read(index)]) != [None]

    def picture_size(self, index: int) -> tuple[int, int]:
        """(width, height) of the picture of row `index`, by its header alone. Raises Unreadable."""
        try:
            return picture_size(self._bytes(index, HEAD_BYTES), self._max_pixels)
        except Unreadable:  # WebP and AVIF want all of it, others may have their header behind much else
            return picture_size(self._bytes(index), self._max_pixels)

    def why_unreadable(self, index: int) -> str | None:
        """In words that go on from the file's name; None for a picture that is read."""
        try:
            return why_unreadable(self._bytes(index))
        except Unreadable as error:
            return str(error)

    def subset(self, images: set[str], size: int | None = None) -> "ImageFileDataset":
        """The first `size` rows whose image is one of `images`."""
        part = copy(self)
        part.rows = [row for row in self.rows if row.image in images][:size]
        part.missing, part._corrupt, part._total = 0, set(), len(part.rows)
        return part

    def without(self, indices: set[int]) -> "ImageFileDataset":
        """All rows but those."""
        part = copy(self)
        part.rows = [row for index, row in enumerate(self.rows) if index not in indices]
        part._corrupt = set()
        return part

    def _bytes(self, index: int, most: int = MOST_BYTES) -> bytes:
        image = self.rows[index].image
        if self._embedded is not None and image in self._embedded:
            return self._embedded.read(image)
        return image_bytes(self.root / image, most)

    def _read(self, index: int) -> bytes:
        """None, which no decoder takes for an image, where it cannot be read; `why_unreadable` says why."""
        try:
            return self._bytes(index)
        except Unreadable:
            return b""

    def _record(self, index: int, picture) -> CaptionRecord:
        row = self.rows[index]
        if self._max_pixels is not None:
            picture = shrink(picture, self._max_pixels)
        return CaptionRecord(row.id, picture, row.prompt, row.reference, row.units, row.questions)

    def _next_sound(self, index: int) -> Reading:
        """The first sound picture behind that of `index`, which is not; the search ends with one too many."""
        unreadable: dict[int, str] = {}
        while len(unreadable) < len(self.rows):
            unreadable[index] = self.why_unreadable(index) or "cannot be decoded"
            if self.missing + len(unreadable) > self._max_missing_fraction * self._total:
                break
            index = (index + 1) % len(self.rows)
            (picture,) = self._decode([self._read(index)])
            if picture is not None:
                return Reading(self._record(index, picture), unreadable)
        return Reading(None, unreadable)

    def _refuse_too_many(self) -> None:
        lost = self.missing + len(self._corrupt)
        if lost > self._max_missing_fraction * self._total:
            raise UserError(
                f"{self.missing} of {self._total} images are missing below {self.root} and {len(self._corrupt)} are "
                f"corrupt{f' (e.g. {self._reason})' if self._reason else ''}; data.max_missing_fraction is "
                f"{self._max_missing_fraction:g}",
                remedy="complete the images, raise data.max_missing_fraction, or in a new run set data.image_prefixes",
            )


def _plain(questions: Sequence[ChoiceQuestion] | None) -> list[tuple]:
    """Nothing for a row without questions: as before rows could have any."""
    return [(each.question, each.choices, each.answer) for each in questions or ()]
