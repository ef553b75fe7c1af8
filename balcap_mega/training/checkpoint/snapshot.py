"""What one rank writes of a checkpoint: its tensors on the host, then its files, digested on their way to the disk."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from balcap_mega.training.checkpoint.format import file_digest


def snapshot(request: AsyncRequest, model: DistributedDataParallel, optimizer: ChainedOptimizer) -> list[WriteBucket]:
    """This rank's part of the save with all tensors on the host, and none of them in memory that training changes."""
    if request.async_fn is None:  # every tensor is another rank's to write
        return []
    changing = _changing_memory(model, optimizer)
    _, buckets, _ = request.async_fn_args
    return [
        (
            path,
            name,
            (
                objects,
                [
                    (item, tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in changing))
                    for item, tensor in tensors
                ],
            ),
        )
        for path, name, (objects, tensors) in buckets
    ]


def write(
    request: AsyncRequest, buckets: Sequence[WriteBucket], own_files: Sequence[Path], partial: Path
) -> dict[str, dict[str, Any]]:
    """Write the buckets and hand Megatron the results it finalizes with.

    Returns size and SHA-256, by name within `partial`, of what it wrote and of `own_files`, which stand there already.
    """
    digests = {file: file_digest(file) for file in own_files}
    if request.async_fn is not None:
        [[transforms], *_], [*_, results] = request.async_fn.args, request.async_fn_args
        written = {}
        for number, (path, name, contents) in enumerate(buckets):
            with open(path, "wb") as file:
                stream = _Digested(file)
                written[number] = [
                    _write_item(transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                    for item, data in chain(*contents)
                ]
                file.flush()
                os.fsync(file.fileno())
            digests[Path(path)] = stream.digest()
        results.put(written)
    return {str(file.relative_to(partial)): digest for file, digest in digests.items()}


class _Digested:
    """A file that is written from its beginning to its end, and the digest of all that went into it."""

    def __init__(self, file: BinaryIO):
        self._file, self._sum, self._bytes = file, hashlib.sha256(), 0

    def write(self, data) -> int:
        self._sum.update(data)
        self._bytes += memoryview(data).nbytes
        return self._file.write(data)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> dict[str, Any]:
        """As `file_digest` would find it."""
        return {"bytes": self._bytes, "sha256": self._sum.hexdigest()}


def _changing_memory(model: DistributedDataParallel, optimizer: ChainedOptimizer) -> set[int]:
    """Where weights and optimizer state live: what Megatron copied for the save lies elsewhere."""
    policy = model.module
    tensors = chain(policy.parameters(), policy.buffers(), _tensors(optimizer))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _tensors(optimizer: ChainedOptimizer) -> Iterable[Tensor]:
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
