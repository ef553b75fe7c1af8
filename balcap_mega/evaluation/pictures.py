"""The pictures an evaluation is about: each looked at once, before anything is generated, asked or paid for."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from balcap_mega.data.headers import Unreadable
from balcap_mega.data.image_files import read_image_file
from balcap_mega.data.images import decode, why_unreadable
from balcap_mega.errors import UserError

MISSING, UNREADABLE = "no_picture", "unreadable_picture"


@dataclass(frozen=True)
class Pictures:
    """Picture files below `root`, by their path there.

    digests:  SHA-256 of each file that can be decoded
    unusable: why each of the others cannot be judged, MISSING or UNREADABLE
    """

    root: Path
    digests: dict[str, str]
    unusable: dict[str, str]

    @classmethod
    def look_at(cls, root: Path, names: Iterable[str]) -> "Pictures":
        """Read and decode every one of `names`. One that cannot be is set aside; it does not end a run of thousands."""
        names = list(dict.fromkeys(names))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # PIL decodes without holding Python's lock
            found = dict(zip(names, pool.map(lambda name: _digest(root / name), names), strict=True))
        digests = {name: digest for name, digest in found.items() if digest not in (MISSING, UNREADABLE)}
        return cls(root, digests, {name: why for name, why in found.items() if name not in digests})

    def refuse_too_many_unusable(self, most: float) -> None:
        """Raise UserError if more than the fraction `most` of the pictures cannot be used."""
        total = len(self.digests) + len(self.unusable)
        if len(self.unusable) > most * total:
            name, reason = next(iter(self.unusable.items()))
            why = "is not there" if reason == MISSING else why_unreadable(read_image_file(self.root / name))
            raise UserError(
                f"{len(self.unusable)} of {total} pictures below --images {self.root} are missing or cannot be "
                f"decoded, e.g. {name!r} {why}; --max-unjudged is {most:g}",
                remedy="check --images, complete the pictures, or raise --max-unjudged",
            )

    def read(self, name: str) -> Image.Image:
        return read_picture(self.root / name)


def read_picture(path: Path) -> Image.Image:
    """An image file as training would read it. Raises UserError for one that cannot be decoded."""
    try:
        return decode(read_image_file(path))
    except Unreadable as error:
        raise UserError(f"{path} cannot be decoded: it {error}", remedy="replace the image") from None


def _digest(path: Path) -> str:
    if not path.is_file():
        return MISSING
    data = read_image_file(path)
    return hashlib.sha256(data).hexdigest() if why_unreadable(data) is None else UNREADABLE
