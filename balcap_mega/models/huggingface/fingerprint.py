"""A digest of a checkpoint's content that takes seconds for any size."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from balcap_mega.errors import UserError

SMALL_FILES = (".json", ".jinja", ".model", ".txt")  # configuration, tokenizer, processor, index
WHOLE = 2**28  # bytes of safetensors that are read whole; more are read in samples
SAMPLES = 4  # of each tensor
SAMPLE = 2**14  # bytes


def checkpoint_digest(folder: str | Path) -> str:
    """Names and content of what a run reads of a Hugging Face folder.

    Every byte of its small files (`SMALL_FILES`) and of each safetensors header: names, dtypes, shapes, places; and the
    files' sizes. Of weights every byte where the folder has at most `WHOLE` of them, else `SAMPLES` x `SAMPLE` bytes of
    each tensor, spread evenly from its first to its last. Training moves next to all weights and is seen; a change that
    leaves most of a large tensor alone may not be.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        weights = [path for path in files if path.suffix == ".safetensors"]
        whole = sum(path.stat().st_size for path in weights) <= WHOLE
        for path in files:
            if path in weights or path.suffix in SMALL_FILES:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                for part in _samples(path) if path in weights and not whole else _parts(path):
                    digest.update(part)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.path={folder} cannot be read ({error})", remedy="download the checkpoint again"
        ) from error
    return digest.hexdigest()[:32]


def _parts(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while part := file.read(2**22):
            yield part


def _samples(path: Path) -> Iterator[bytes]:
    """The header, and of each tensor some bytes at even distances."""
    with open(path, "rb") as file:
        length = file.read(8)
        size = int.from_bytes(length, "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path.name} is not a whole safetensors file")
        header = file.read(size)
        yield length + header
        tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        for start, stop in sorted(tensors):
            places = {start + (stop - start - SAMPLE) * n // (SAMPLES - 1) for n in range(SAMPLES)}
            for place in sorted(places) if stop - start > SAMPLE else [start]:
                file.seek(8 + size + place)
                yield file.read(min(SAMPLE, stop - place))
