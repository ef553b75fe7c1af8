"""Checks the pickles in a checkpoint before Megatron loads them: they may build data, and do nothing else.

    .metadata              torch's index of the shard files: a raw pickle
    common.pt              small values: a `torch.save` file
    a layer's extra state  a `torch.save` file within the shard files, which torch reads without `weights_only`; for
                           FP8 layers it holds the bytes of one more pickle, which Transformer Engine reads

Unpicklers that allow only the classes of such content read all of them first. A pickle that passes cannot run code
when Megatron reads it again.
"""

import io
import json
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What a pickle that is no whole or no genuine one raises, by the manual of `pickle` and by trying.
MALFORMED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
_FP8_CLASSES = {
    "collections": {"OrderedDict"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "QParams",
        "_FormatHelper",
    },
}


def foreign_content(folder: Path) -> str | None:
    """None when Megatron's checkpoint in `folder` holds tensors and numbers alone, else what is wrong with it."""
    name = "metadata.json"
    try:
        if json.loads((folder / name).read_bytes()) != BACKEND:
            return f"{name} names another format"
        name = "common.pt"
        torch.load(folder / name, map_location="cpu", weights_only=True)
        name = ".metadata"
        index = _IndexUnpickler.read((folder / name).read_bytes())
        if not isinstance(index, Metadata):
            return f"{name} is no index"
        for key, stored in index.storage_data.items():
            name = stored.relative_path
            if Path(name).name != name:
                return f".metadata names {name!r}, outside the checkpoint"
            if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata):
                with open(folder / name, "rb") as file:
                    file.seek(stored.offset)
                    _read_extra_state(file.read(stored.length))
    except MALFORMED as error:
        foreign = re.search(r"refers to (\S+)|GLOBAL (\S+)", str(error))
        return f"{name} refers to {foreign[1] or foreign[2]}" if foreign else f"{name} is malformed"
    return None


def _read_extra_state(data: bytes) -> None:
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for part in state if isinstance(state, list) else [state]:
        if isinstance(part, io.BytesIO):
            torch.load(part, map_location="cpu", weights_only=True)
        elif isinstance(part, torch.Tensor) and part.numel():
            _Fp8StateUnpickler.read(part.numpy().tobytes())


class _RestrictedUnpickler(pickle.Unpickler):
    """Allows the classes in `classes`, by module, and torch's dtypes. Others raise one of MALFORMED."""

    classes: dict[str, set[str]]

    @classmethod
    def read(cls, data: bytes) -> Any:
        """Raises one of MALFORMED for a pickle that names another class or was not written by `pickle.dump`."""
        for opcode, _, _ in pickletools.genops(data):
            # Protocols since 4 count their memo up; a number given makes the unpickler allocate up to it: 32 GB.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                raise pickle.UnpicklingError(f"opcode {opcode.name}")
        return cls(io.BytesIO(data)).load()

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in self.classes.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


class _IndexUnpickler(_RestrictedUnpickler):
    classes = _INDEX_CLASSES


class _Fp8StateUnpickler(_RestrictedUnpickler):
    classes = _FP8_CLASSES

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):  # a tensor's values are a `torch.save` file within
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return super().find_class(module, name)
