"""Which checkpoint wrote a file of captions: kept beside it, so that captions of one are never scored as another's."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from balcap_mega.errors import UserError
from balcap_mega.evaluation.fingerprint import beside, digest
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import read_json, write_json


@dataclass(frozen=True)
class CaptionsMaker:
    """Everything that determines a greedy caption but its picture."""

    checkpoint: str
    content: str  # SHA-256 over the checkpoint's files
    prompt: str
    max_tokens: int


@dataclass
class Provenance:
    """The file beside a captions file. made: by image, the digests of its picture and of its caption."""

    maker: CaptionsMaker
    made: dict[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def read(cls, captions: Path) -> "Provenance | None":
        """What is known of a captions file; None if nothing is."""
        path = beside(captions, "made_by.json")
        return read_json(path, "the captions' provenance", cls) if path.exists() else None

    def write(self, captions: Path) -> None:
        """Before the captions themselves: then an interruption leaves none that are not known."""
        write_json(beside(captions, "made_by.json"), asdict(self))

    def add(self, captions: Mapping[str, str], pictures: Mapping[str, str]) -> None:
        """Take up captions of the pictures with these digests."""
        self.made |= {key: (pictures[key], digest(caption)) for key, caption in captions.items()}

    def strangers(self, captions: Mapping[str, str], pictures: Mapping[str, str]) -> list[str]:
        """Images whose caption is not what `maker` wrote, or whose picture, where it is known, is another one now."""

        def made_here(key: str, caption: str) -> bool:
            picture, text = self.made.get(key, ("", ""))
            return text == digest(caption) and pictures.get(key, picture) == picture

        return [key for key, caption in captions.items() if not made_here(key, caption)]


def continued(path: Path, captions: Mapping[str, str], maker: CaptionsMaker, pictures: Mapping[str, str]) -> Provenance:
    """The provenance to complete captions of `path` under. Raises UserError unless `maker` wrote all that are there."""
    remedy = f"name another --captions file, leave out --model to score {path} as it is, or delete it"
    known = Provenance.read(path)
    if not captions:
        return Provenance(maker)
    if known is None:
        raise UserError(f"{path} holds captions, and nothing says that {maker.checkpoint} wrote them", remedy=remedy)
    if known.maker != maker:
        was, now = asdict(known.maker), asdict(maker)
        names = [name for name in now if was[name] != now[name]]
        if names == ["checkpoint"]:  # moved or renamed, and the same to the last byte
            return Provenance(maker, known.made)
        shown = ", ".join(f"{name} {was[name]!r}, not {now[name]!r}" for name in names)
        raise UserError(f"{path} holds captions of another making: {shown}", remedy=remedy)
    if strangers := known.strangers(captions, pictures):
        raise UserError(
            f"{path}: the caption of {strangers[0]!r}, or its picture, was changed since {maker.checkpoint} wrote it",
            remedy=remedy,
        )
    return known


def origin(path: Path, captions: Mapping[str, str], pictures: Pictures | None) -> dict | None:
    """Who wrote the captions, for the report; None if nobody knows, or one was changed since."""
    known = Provenance.read(path)
    if known is None or known.strangers(captions, {} if pictures is None else pictures.digests):
        return None
    return asdict(known.maker)


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, hidden ones and texts about it left out."""
    paths = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in (".md", ".partial")
    )
    with ThreadPoolExecutor(8) as pool:  # hashing releases Python's lock
        return digest(dict(zip((path.name for path in paths), pool.map(_file_digest, paths), strict=True)))


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
