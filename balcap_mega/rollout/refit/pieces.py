"""Rectangles of parameters and their checksums, which both sides of a refit use."""

from dataclasses import dataclass

import torch
from torch import Tensor

from balcap_mega.rollout.refit.transfers import Place

CHECKSUM_CHUNK = 2**22


class CorruptPieces(ValueError):
    """The checksum of a piece differs from its sender's."""


@dataclass(frozen=True)
class Write:
    """Copy `values` [rows, cols] to `place` in the engine's parameters."""

    place: Place
    values: Tensor


def rectangle(parameter: Tensor, place: Place) -> Tensor:
    """A view [rows, cols] of `parameter`, of which a vector is one column and a convolution is [outputs, -1]."""
    (top, bottom), (left, right) = place.rows, place.cols
    return parameter.detach().view(parameter.shape[0], -1)[top:bottom, left:right]


def checksums(rectangles: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[n, 2] int64 on the CPU: for each rectangle the sum of its elements' bits, plain and weighted by position.

    dtype: what elements are cast to first; their bits count as an integer of that size
    """
    empty = torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    return torch.stack([_checksum(values, dtype) for values in rectangles]) if rectangles else empty


def _checksum(values: Tensor, dtype: torch.dtype) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    total = torch.zeros(2, dtype=torch.int64, device="cpu")  # whatever the default device is
    position = 0
    for rows in values.split(max(CHECKSUM_CHUNK // max(values.shape[1], 1), 1)):
        bits = rows.to(dtype).contiguous().view(integers).flatten().long()
        weights = torch.arange(position + 1, position + 1 + len(bits), device=bits.device)
        total += torch.stack([bits.sum(), (bits * weights).sum()]).cpu()
        position += len(bits)
    return total
