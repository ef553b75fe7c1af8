"""Image files by the names that annotations give them: which of these may be read, and their bytes."""

import logging
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from balcap_mega.data.headers import Unreadable
from balcap_mega.errors import UserError

log = logging.getLogger(__name__)

MOST_BYTES = 2**28  # of an image file; MOST_PIXELS have 200 MB without any compression
# How files begin whose pictures end before they do: a phone puts its video behind a photo.
MAY_GO_ON = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF")


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


def present_files(root: Path, images: set[str]) -> set[str]:
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
