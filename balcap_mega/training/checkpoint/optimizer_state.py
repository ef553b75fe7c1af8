"""The distributed optimizer in a checkpoint: each rank writes and reads its own share, with no gathering.

Megatron cuts its flat buffers evenly, so a rank's share of a parameter is a stretch of its elements, cut anywhere.
Megatron-Core 0.16 stores such shares in no form that another layout could read without gathering the whole state of a
tensor x pipeline shard, on one host when saving and on every rank when loading. A stretch is, though, a few rectangles
of the parameter, and Megatron's format knows tensors in rectangles: keys, shapes and values are those of
`fully_reshardable`, and torch puts together what a rank asks for out of the rectangles that are stored.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

STATES = ("param", "exp_avg", "exp_avg_sq")
"""Of each trained parameter, as Megatron names them: the float32 weight and AdamW's two moments."""


@dataclass(frozen=True)
class OptimizerShare:
    """What this rank holds of the optimizer's state.

    tensors: by parameter and by `STATES`, the flat stretch that is this rank's. Megatron's own memory as a rule; where
             it keeps another dtype than float32, a copy, which `restore` writes back
    sharded: the same memory as rectangles of the model's tensors, to be written from or read into
    """

    tensors: dict[nn.Parameter, dict[str, Tensor]]
    sharded: dict[str, ShardedTensor]

    @classmethod
    def of(cls, optimizer: DistributedOptimizer, weights: ShardedStateDict) -> "OptimizerShare":
        """weights: the model's sharded state, of parameters as they are (`keep_vars`)."""
        places = {
            weight.data: weight
            for weight in nested_values(weights)
            if isinstance(weight, ShardedTensor | ShardedTensorFactory)
        }
        tensors, sharded = {}, {}
        for parameter, start, end in _stretches(optimizer):
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            tensors[parameter] = {name: held[name].detach().float() for name in STATES}
            pieces = _pieces(places[parameter], parameter)
            for name, stretch in tensors[parameter].items():
                for part in _rectangles(pieces, start, end, stretch, f"optimizer.state.{name}."):
                    sharded[str(len(sharded))] = part
        return cls(tensors, sharded)

    @torch.no_grad()
    def restore(self, optimizer: DistributedOptimizer) -> None:
        """Have the optimizer take over what was read into the rectangles."""
        for parameter, tensors in self.tensors.items():
            others = optimizer._get_main_param_and_optimizer_states(parameter)  # AdamW's count of steps
            optimizer._set_main_param_and_optimizer_states(parameter, others | tensors)


def rectangles(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the rectangles that the elements [start, end) of a row-major tensor make up, in that order.

    They are 2 n - 1 at most in n dimensions: part of a row, whole rows, part of a row, and each part likewise.
    """
    if start >= end:
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows are [first, last)
    if first > last:
        yield from _in_row(last, shape, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _in_row(first - 1, shape, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < end:
        yield from _in_row(last, shape, 0, end - last * row)


def _in_row(index: int, shape: Sequence[int], start: int, end: int):
    for offsets, sizes in rectangles(shape[1:], start, end):
        yield (index, *offsets), (1, *sizes)


def _stretches(optimizer: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, int, int]]:
    """This rank's parameters, each with the range of its flat elements that is this rank's. A bucket may hold none."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(weight: ShardedTensor | ShardedTensorFactory, parameter: nn.Parameter) -> list[ShardedTensor]:
    """A parameter's places in the model's tensors, over memory of no content: a gate and a projection are two."""
    empty = torch.empty(parameter.shape, dtype=torch.float32, device="meta")
    if isinstance(weight, ShardedTensorFactory):
        pieces = list(nested_values(replace(weight, data=empty).build()))
    else:
        pieces = [replace(weight, data=empty, dtype=empty.dtype)]
    if not all(piece.data.is_contiguous() for piece in pieces):
        raise NotImplementedError(f"{weight.key} is cut across its rows; the distributed optimizer cannot be saved")
    return pieces


def _rectangles(
    pieces: Sequence[ShardedTensor], start: int, end: int, held: Tensor, prefix: str
) -> Iterator[ShardedTensor]:
    """`held`, the elements [start, end) of a parameter, as rectangles of the tensors that `pieces` belong to."""
    for piece in pieces:
        begin = piece.data.storage_offset()
        at, until = max(start, begin), min(end, begin + piece.data.numel())
        for offsets, sizes in rectangles(piece.local_shape, at - begin, until - begin):
            sizes = (1,) * piece.prepend_axis_num + sizes
            offsets = (0,) * piece.prepend_axis_num + offsets
            length = math.prod(sizes)
            yield replace(
                piece,
                key=prefix + piece.key,
                data=held[at - start : at - start + length].view(sizes),
                dtype=held.dtype,
                local_shape=sizes,
                global_offset=tuple(sum(pair) for pair in zip(piece.global_offset, offsets, strict=True)),
                axis_fragmentations=None,  # rectangles of any size
                prepend_axis_num=0,
                replica_id=(*piece.replica_id[:2], 0),  # each data-parallel rank has others
            )
            at += length
