"""A Hugging Face folder's safetensors, checked from their headers against what an architecture needs."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.tensors import canonical_name, head_name, huggingface_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BAND_ROWS = 4096
FLOATS = ("F64", "F32", "F16", "BF16")


class _Index(BaseModel):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, the name it is stored under there, its shape and safetensors dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def check_checkpoint(folder: str | Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """Every tensor of `huggingface_shapes(architecture)`, found in `folder`. Reads headers only, allocates nothing.

    Raises UserError naming the tensors that are missing, unexpected, misshapen or quantised. A stored head beside tied
    embeddings is compared with them: transformers and vLLM use it where it differs, in spite of the configuration.
    """
    stored = _read_headers(Path(folder), architecture)
    expected = huggingface_shapes(architecture)
    head = stored.pop(architecture.family.head, None) if architecture.tie_word_embeddings else None
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in stored if name not in expected],
        "of another shape": [
            f"{name} {list(stored[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in stored and stored[name].shape != shape
        ],
        "not plain floats": [
            f"{name} ({tensor.dtype})"
            for name, tensor in stored.items()
            if name in expected and tensor.dtype not in FLOATS
        ],
    }
    found = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if found:
        raise UserError(
            f"the weights in {folder} are not those of its config.json ({found})",
            remedy="download the checkpoint again, whole and unquantised, with the config.json that belongs to it",
        )
    if head is not None and not _same(head, stored[head_name(architecture)]):
        raise UserError(
            f"{folder}/config.json ties the word embeddings, but {head.name} is stored and is not the embedding",
            remedy="set tie_word_embeddings to false in config.json: so do transformers and vLLM read this folder",
        )
    return stored


def _same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two matrices hold the same numbers; read a band of rows at a time."""
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as left, safe_open(other.file, framework="pt") as right:
        a, b = left.get_slice(one.name), right.get_slice(other.name)
        bands = ((row, row + BAND_ROWS) for row in range(0, one.shape[0], BAND_ROWS))
        return all(torch.equal(a[start:stop], b[start:stop]) for start, stop in bands)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _read_headers(folder: Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """All stored tensors by their canonical names."""
    tensors: dict[str, StoredTensor] = {}
    for file in _files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not iterable itself)
                    canonical = canonical_name(architecture.family, name)
                    if canonical is None:
                        continue
                    if canonical in tensors:
                        raise UserError(
                            f"{file}: {name} and {tensors[canonical].name} are the same tensor",
                            remedy="delete the safetensors files that do not belong to this checkpoint",
                        )
                    header = opened.get_slice(name)
                    tensors[canonical] = StoredTensor(file, name, tuple(header.get_shape()), header.get_dtype())
        except SafetensorError as error:
            raise UserError(
                f"{file} is not a whole safetensors file ({error})", remedy="download the checkpoint again"
            ) from error
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
        except (OSError, ValidationError) as error:
            raise UserError(f"{index} is not a safetensors index", remedy="download the checkpoint again") from error
        if any(Path(name).name != name for name in weight_map.values()):
            raise UserError(f"{index} names files outside its folder", remedy="download the checkpoint again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / SINGLE_FILE]
    missing = [file.name for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"{folder} lacks {_some(missing)}",
            remedy="download the checkpoint again, in safetensors format (.bin files hold pickles and are not read)",
        )
    return files
