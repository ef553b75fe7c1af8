"""A dataset of image files and their captions: rows in memory, pictures read when a record is asked for."""

import logging
import os
import re
import stat
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.headers import Unreadable, picture_size
from balcap_mega.data.images import ImageDecoder, PilDecoder, shrink, why_unreadable
from balcap_mega.data.inputs import digest_of
from balcap_mega.data.questions import ChoiceQuestion
from balcap_mega.data.records import CaptionRecord, refuse_placeholders
from balcap_mega.errors import UserError

log = logging.getLogger(__name__)

MOST_BYTES = 2**28  # of an image file; MOST_PIXELS have 200 MB without any compression
HEAD_BYTES = 2**16  # of an image file, in which its header mostly lies
# How files begin whose pictures end before they do: a phone puts its video behind a photo.
MAY_GO_ON = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF")


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One annotation. `image` is a path below the dataset's image root, or the name of an embedded picture."""

    id: str
    image: str
    prompt: str
    reference: str
    units: tuple[str, ...] | None = None
    questions: tuple[ChoiceQuestion, ...] | None = None


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
    ):
        self.root = Path(image_root)
        total, left_out = len(rows), [row for row in rows if isinstance(row, LeftOut)]
        rows = [row for row in rows if isinstance(row, ImageRow)]
        inside = {row.image for row in rows if row.image in embedded} if embedded is not None else set()
        refuse_all_outside((row.image, f"row {row.id!r}") for row in rows if row.image not in inside)
        for row in rows:
            refuse_placeholders(row.prompt, f"row {row.id!r}")
        present = inside | _present_files(self.root, {row.image for row in rows} - inside)
        self.rows = [row for row in rows if row.image in present]
        self.missing = total - len(self.rows)
        self.absent = tuple(sorted({row.image for row in rows} - present))
        self._total = total
        self._embedded = embedded
        self._decode = decode or PilDecoder()
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
        for index in indices:
            if not 0 <= index < len(self.rows):
                raise IndexError(f"record {index} of a dataset of {len(self.rows)}")
        pictures = self._decode([self._read(index) for index in indices])
        return [
            self._next_sound(index) if picture is None else self._record(index, picture)
            for index, picture in zip(indices, pictures)
        ]

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

    def _next_sound(self, index: int) -> CaptionRecord:
        while True:
            if index not in self._corrupt:
                self._corrupt.add(index)
                self._reason = f"{str(self.root / self.rows[index].image)!r} {self.why_unreadable(index)}"
                log.warning("%s; the next image takes its place", self._reason)
                self._refuse_too_many()
                if len(self._corrupt) == len(self.rows):
                    raise UserError(
                        f"no image below {self.root} can be decoded, e.g. {self._reason}", remedy="replace the images"
                    )
            index = (index + 1) % len(self.rows)
            (picture,) = self._decode([self._read(index)])
            if picture is not None:
                return self._record(index, picture)

    def _refuse_too_many(self) -> None:
        lost = self.missing + len(self._corrupt)
        if lost > self._max_missing_fraction * self._total:
            raise UserError(
                f"{self.missing} of {self._total} images are missing below {self.root} and {len(self._corrupt)} are "
                f"corrupt{f' (e.g. {self._reason})' if self._reason else ''}; data.max_missing_fraction is "
                f"{self._max_missing_fraction:g}",
                remedy="complete the images, raise data.max_missing_fraction, or in a new run set data.image_prefixes",
            )


def refuse_all_outside(images: Iterable[tuple[str, str]]) -> None:
    """`refuse_outside` for many (image, where): of each kind of path that is refused, the first is named."""
    refused: dict[str, str] = {}
    remedies: dict[str, None] = {}
    for image, where in images:
        if (found := _is_no_path_below(image)) and found[0] not in refused:
            refused[found[0]] = f"{where}: image {image[:100]!r} {found[0]}"
            remedies[found[1]] = None
    if refused:
        raise UserError("; ".join(refused.values()), remedy="; ".join(remedies))


def refuse_outside(image: str, where: str) -> None:
    """Raise UserError, naming `where` the path stands, for one that does not lie below the image root by its name.

    Links that the root itself holds are its owner's and are followed: large collections are put together with them.
    """
    refuse_all_outside([(image, where)])


def _is_no_path_below(image: str) -> tuple[str, str] | None:
    """(what it is instead, what to do)."""
    path = PurePosixPath(image)
    below = "write it relative to data.image_root, without '..'"
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", image):
        return "is an address, and pictures are not fetched", "download them, and name the files below the image root"
    if image.startswith("data:"):
        return "is the picture itself, embedded", "write pictures to files, or use data.source=parquet"
    if "\\" in image or re.match(r"[a-zA-Z]:", image):
        return (
            "is a Windows path, which does not lie below the image root",
            "write it with '/', relative to data.image_root",
        )
    if not path.name or "\0" in image:
        return "does not lie below the image root: it names no file", below
    if path.is_absolute() or ".." in path.parts:
        return "does not lie below the image root", below
    return None


def image_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The file's first bytes, at most `most` of them. Raises Unreadable if it is no plain file, or larger.

    A pipe or a device in an image's place would be waited for, or read, for ever.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("is no plain file")
            if status.st_size > MOST_BYTES and not file.read(8).startswith(MAY_GO_ON):
                raise Unreadable(f"has {status.st_size} bytes, more than the {MOST_BYTES} that are read of an image")
            file.seek(0)
            return file.read(most)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None


def read_image_file(path: Path) -> bytes:
    """The same; none, which no decoder takes for an image, where `image_bytes` raises."""
    try:
        return image_bytes(path)
    except Unreadable as error:
        log.warning("%r %s", str(path), error)
        return b""


def _plain(questions: Sequence[ChoiceQuestion] | None) -> list[tuple]:
    """Nothing for a row without questions: as before rows could have any."""
    return [(each.question, each.choices, each.answer) for each in questions or ()]


def _present_files(root: Path, images: set[str]) -> set[str]:
    """Those of `images` that exist. One listing a folder: 100k single look-ups take minutes on a network disk."""
    folders: dict[str, set[str]] = {}
    present = set()
    for image in images:
        folder, name = os.path.split(image)
        if folder not in folders:
            try:
                folders[folder] = set(os.listdir(root / folder))
            except OSError:
                folders[folder] = set()
        if name in folders[folder]:
            present.add(image)
    return present
