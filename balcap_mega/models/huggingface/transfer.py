"""Weights in from, and out to, a folder in the Hugging Face layout, at any Megatron layout.

Both directions walk the mapping table (`mapping.py`), tensor by tensor, and no rank ever holds the model:

- Import copies each slice that a rank needs from the memory-mapped file straight into its parameter. Beyond the
  parameters, a rank's own host memory grows by one such slice; file pages are the kernel's to drop.
- Export lets the tensor-parallel ranks of each pipeline stage write that stage's shard files in turns, each assembling
  one file at a time from what the others send it: `shard_bytes` of host memory a rank (or the largest tensor, if that
  is more), and on the device one slice.
"""

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from balcap_mega.errors import UserError
from balcap_mega.models.huggingface.files import INDEX_FILE, check_checkpoint
from balcap_mega.models.huggingface.mapping import megatron_blocks
from balcap_mega.models.huggingface.table import Block
from balcap_mega.models.huggingface.tensors import huggingface_shapes
from balcap_mega.models.policy import VisionLanguagePolicy
from balcap_mega.models.squares import let_processor_pad
from balcap_mega.parallel.groups import process_grid, tensor_group
from balcap_mega.parallel.progress import progress

SHARD_BYTES = 2 * 2**30


def import_checkpoint(folder: str | Path, policy: VisionLanguagePolicy) -> None:
    """Read this rank's slices of the weights in `folder` into `policy`, in place, cast to its dtype.

    No collective: ranks read on their own. Raises UserError (see `check_checkpoint`, which the caller may also run
    before it builds a policy) before any parameter is touched.
    """
    stored = check_checkpoint(folder, policy.architecture)
    parameters = _matrices(policy)
    blocks = _blocks(policy)
    _check_table(parameters, blocks)
    by_file = defaultdict(list)
    for block in blocks:
        by_file[stored[block.hf_name].file].append(block)
    with torch.no_grad():
        for name in _padded(parameters, blocks):
            parameters[name].zero_()
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for block in wanted:
                    progress.mark()  # a large model from a slow disk is no standstill
                    source = opened.get_slice(stored[block.hf_name].name)
                    _part(parameters[block.parameter], block.rows, block.cols).copy_(_read(source, block))


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: the tensors in it, all of which stand on pipeline stage `stage`."""

    name: str
    stage: int
    tensors: tuple[str, ...]


def export_checkpoint(
    policy: VisionLanguagePolicy,
    source: str | Path,
    folder: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    pad_to_square: bool = False,
) -> None:
    """Write `policy` to the new folder `folder`; config, tokenizer and processor files are copied from `source`.

    pad_to_square: the policy was trained on padded pictures, and the processor shall pad them for whoever loads it

    A collective of all ranks; the first data-parallel replica writes. The folder appears under its name only when it is
    whole. Raises UserError on every rank where `folder` exists already.
    """
    source, folder = Path(source), Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    grid = process_grid()
    is_first_rank = torch.distributed.get_rank() == 0
    verdict = [is_first_rank and folder.exists()]
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise UserError(f"{folder} exists already", remedy="choose another folder to export to, or delete this one")
    if is_first_rank:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()

    dtype = policy.config.params_dtype
    tables = [
        [_blocks(policy, tensor_rank, pipeline_rank) for tensor_rank in range(grid.tensor_size)]
        for pipeline_rank in range(grid.pipeline_size)
    ]
    shards = plan_shards(
        huggingface_shapes(policy.architecture),
        [{block.hf_name for table in stage for block in table} for stage in tables],
        element_size=dtype.itemsize,
        shard_bytes=shard_bytes,
    )
    if grid.data_rank == 0:
        _write_stage(policy, partial, shards, tables[grid.pipeline_rank])
    torch.distributed.barrier()
    if is_first_rank:
        shapes = huggingface_shapes(policy.architecture)
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _copy_companions(
            source, partial, dtype, policy.architecture.family.padding_processor if pad_to_square else None
        )
        partial.rename(folder)
    torch.distributed.barrier()


def plan_shards(
    shapes: dict[str, tuple[int, ...]], stages: list[set[str]], *, element_size: int, shard_bytes: int
) -> list[ShardFile]:
    """Deal every tensor to a file of the first stage that holds it, files of at most `shard_bytes` or one tensor."""
    groups: list[tuple[int, list[str]]] = []
    seen: set[str] = set()
    for stage, names in enumerate(stages):
        size = shard_bytes + 1  # the first tensor opens a file
        for name in (name for name in shapes if name in names - seen):
            tensor_bytes = torch.Size(shapes[name]).numel() * element_size
            if size + tensor_bytes > shard_bytes:
                groups.append((stage, []))
                size = 0
            groups[-1][1].append(name)
            size += tensor_bytes
        seen |= names
    return [
        ShardFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", stage, tuple(names))
        for number, (stage, names) in enumerate(groups, start=1)
    ]


def _write_stage(
    policy: VisionLanguagePolicy, folder: Path, shards: list[ShardFile], tables: list[list[Block]]
) -> None:
    """Assemble and write this stage's files, as many at a time as it has tensor-parallel ranks, one on each."""
    grid = process_grid()
    parameters, shapes = _matrices(policy), huggingface_shapes(policy.architecture)
    pieces = [defaultdict(list) for _ in tables]
    for rank, table in enumerate(tables):
        for block in table:
            pieces[rank][block.hf_name].append(block)

    def write(files: list[ShardFile]) -> None:
        # All ranks send and receive in the order of this loop; then the writers write side by side.
        tensors: dict[str, Tensor] = {}
        for writer, file in enumerate(files):
            for name in file.tensors:
                tensor = _assemble(name, shapes[name], writer, pieces, parameters)
                if tensor is not None:
                    tensors[name] = tensor
        progress.mark()
        if tensors:
            save_file(tensors, folder / files[grid.tensor_rank].name, metadata={"format": "pt"})

    mine = [shard for shard in shards if shard.stage == grid.pipeline_rank]
    for first in range(0, len(mine), grid.tensor_size):
        write(mine[first : first + grid.tensor_size])


def _assemble(
    name: str,
    shape: tuple[int, ...],
    writer: int,
    pieces: list[dict[str, list[Block]]],
    parameters: dict[str, Tensor],
) -> Tensor | None:
    """The whole tensor on the CPU of tensor-parallel rank `writer`; None on the others, which send their blocks."""
    group = tensor_group()
    is_writer = group.rank() == writer
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    own = pieces[writer][name]
    is_whole = sum((b.rows[1] - b.rows[0]) * (b.cols[1] - b.cols[0]) for b in own) == rows * columns
    dtype = next(iter(parameters.values())).dtype
    device = next(iter(parameters.values())).device
    tensor = torch.empty(rows, columns, dtype=dtype) if is_writer else None
    for rank in [writer] if is_whole else range(group.size()):
        for block in pieces[rank][name]:
            if rank == group.rank():
                part = _part(parameters[block.parameter], block.rows, block.cols)
                if not is_writer:
                    torch.distributed.send(part.contiguous(), group=group, group_dst=writer)
            elif is_writer:
                height, width = block.hf_rows[1] - block.hf_rows[0], block.hf_cols[1] - block.hf_cols[0]
                part = torch.empty(height, width, dtype=dtype, device=device)
                torch.distributed.recv(part, group=group, group_src=rank)
            if is_writer:
                _part(tensor, block.hf_rows, block.hf_cols).copy_(part)
    return tensor.view(shape) if is_writer else None


def _copy_companions(source: Path, folder: Path, dtype: torch.dtype, padding_processor: str | None = None) -> None:
    """Everything beside the weights; config.json says which dtype they have now.

    padding_processor: the image processor that shall pad pictures to squares for whoever loads the folder
    """
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != INDEX_FILE:
            shutil.copyfile(file, folder / file.name)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for section in (config, config.get("text_config", {}), config.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if padding_processor is not None:
        let_processor_pad(folder, padding_processor)


def _blocks(
    policy: VisionLanguagePolicy, tensor_rank: int | None = None, pipeline_rank: int | None = None
) -> list[Block]:
    """The table of a rank of this layout: this one's own unless told."""
    grid = process_grid()
    return megatron_blocks(
        policy.architecture,
        tensor_rank=grid.tensor_rank if tensor_rank is None else tensor_rank,
        tensor_size=grid.tensor_size,
        pipeline_rank=grid.pipeline_rank if pipeline_rank is None else pipeline_rank,
        pipeline_size=grid.pipeline_size,
        transformer_engine=policy.transformer_engine,
    )


def _matrices(policy: VisionLanguagePolicy) -> dict[str, Tensor]:
    """This rank's parameters as the mapping sees them: views [shape[0], rest]."""
    return {name: parameter.detach().view(parameter.shape[0], -1) for name, parameter in policy.named_parameters()}


def _padded(parameters: dict[str, Tensor], blocks: list[Block]) -> list[str]:
    """Parameters that the blocks do not fill: vocabulary slices with padding rows."""
    left = {name: parameter.numel() for name, parameter in parameters.items()}
    for block in blocks:
        left[block.parameter] -= (block.rows[1] - block.rows[0]) * (block.cols[1] - block.cols[0])
    return [name for name, elements in left.items() if elements]


def _check_table(parameters: dict[str, Tensor], blocks: list[Block]) -> None:
    """The policy and the table agree on names, and only the vocabulary is padded."""
    different = parameters.keys() ^ {block.parameter for block in blocks}
    padded = [
        name for name in _padded(parameters, blocks) if "word_embeddings" not in name and "output_layer" not in name
    ]
    if different or padded:
        raise RuntimeError(f"the mapping table does not fit the policy: {sorted(different)}, {padded}")


def _part(matrix: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    return matrix[rows[0] : rows[1], cols[0] : cols[1]]


def _read(source, block: Block) -> Tensor:
    """The block's rectangle [height, width] of a safetensors slice object."""
    (top, bottom), (left, right) = block.hf_rows, block.hf_cols
    if len(source.get_shape()) == 2:
        return source[top:bottom, left:right]
    return source[top:bottom].reshape(bottom - top, right - left)
