"""A dataset of image files and their captions: rows in memory, pictures read when a record is asked for."""

import logging
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from balcap_mega.data.images import ImageDecoder, PilDecoder, TargetSize, resize_for_model
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One annotation. `image` is a path below the dataset's image root, with forward slashes."""

    id: str
    image: str
    prompt: str
    reference: str
    units: tuple[str, ...] | None = None


class ImageFileDataset:
    """Records of those rows whose image file is there, in the rows' order.

    A picture that turns out to be corrupt is replaced by the next sound one, the same on every rank.
    missing, corrupt: how many rows were left out so far, and how many replaced; more than `max_missing_fraction` of
    all rows raises UserError, at construction or on the access that meets one too many.
    """

    def __init__(
        self,
        rows: Sequence[ImageRow],
        image_root: str | Path,
        *,
        decode: ImageDecoder | None = None,
        target_size: TargetSize | None = None,
        max_missing_fraction: float = 0.01,
    ):
        self.root = Path(image_root)
        for row in rows:
            _refuse_outside(row)
        present = _present_files(self.root, {row.image for row in rows})
        self.rows = [row for row in rows if row.image in present]
        self.missing = len(rows) - len(self.rows)
        self._total = len(rows)
        self._decode = decode or PilDecoder()
        self._target_size = target_size
        self._max_missing_fraction = max_missing_fraction
        self._corrupt: set[int] = set()
        if self.missing:
            absent = next(row.image for row in rows if row.image not in present)
            log.warning("%d of %d images are missing below %s, e.g. %s", self.missing, len(rows), self.root, absent)
        self._refuse_too_many()
        if not self.rows:
            raise UserError(
                f"no row of the dataset has an image below {self.root}",
                remedy="check data.path and data.image_root",
            )

    @property
    def corrupt(self) -> int:
        return len(self._corrupt)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> CaptionRecord:
        return self.load([index])[0]

    def load(self, indices: Sequence[int]) -> list[CaptionRecord]:
        """The records of `indices`, their pictures decoded as one batch."""
        for index in indices:
            if not 0 <= index < len(self.rows):
                raise IndexError(f"record {index} of a dataset of {len(self.rows)}")
        pictures = self._decode([self._read(index) for index in indices])
        return [
            self._next_sound(index) if picture is None else self._record(index, picture)
            for index, picture in zip(indices, pictures)
        ]

    def is_sound(self, index: int) -> bool:
        """Whether the picture of row `index` can be decoded."""
        return self._decode([self._read(index)]) != [None]

    def subset(self, images: set[str], size: int | None = None) -> "ImageFileDataset":
        """The first `size` rows whose image is one of `images`."""
        part = copy(self)
        part.rows = [row for row in self.rows if row.image in images][:size]
        part.missing, part._corrupt, part._total = 0, set(), len(part.rows)
        return part

    def _read(self, index: int) -> bytes:
        return (self.root / self.rows[index].image).read_bytes()

    def _record(self, index: int, picture) -> CaptionRecord:
        row = self.rows[index]
        if self._target_size is not None:
            picture = resize_for_model(picture, self._target_size)
        return CaptionRecord(row.id, picture, row.prompt, row.reference, row.units)

    def _next_sound(self, index: int) -> CaptionRecord:
        while True:
            if index not in self._corrupt:
                self._corrupt.add(index)
                log.warning("%s is corrupt; the next image takes its place", self.root / self.rows[index].image)
                self._refuse_too_many()
            index = (index + 1) % len(self.rows)
            (picture,) = self._decode([self._read(index)])
            if picture is not None:
                return self._record(index, picture)

    def _refuse_too_many(self) -> None:
        lost = self.missing + len(self._corrupt)
        if lost > self._max_missing_fraction * self._total:
            raise UserError(
                f"{self.missing} of {self._total} images are missing below {self.root} and {len(self._corrupt)} are "
                f"corrupt; data.max_missing_fraction is {self._max_missing_fraction:g}",
                remedy="complete the images, keep only rows that you have by data.image_prefixes, or raise the limit",
            )


def _refuse_outside(row: ImageRow) -> None:
    path = PurePosixPath(row.image)
    if path.is_absolute() or ".." in path.parts or "\\" in row.image or "\0" in row.image or not row.image:
        raise UserError(
            f"row {row.id}: image {row.image!r} does not lie below the image root",
            remedy="write it relative to data.image_root, without '..'",
        )


def _present_files(root: Path, images: set[str]) -> set[str]:
    """Those of `images` that exist. One listing a folder: 100k single look-ups take minutes on a network disk."""
    folders: dict[str, set[str]] = {}
    present = set()
    for image in images:
        folder, name = os.path.split(image)
        if folder not in folders:
            path = root / folder
            folders[folder] = set(os.listdir(path)) if path.is_dir() else set()
        if name in folders[folder]:
            present.add(image)
    return present
