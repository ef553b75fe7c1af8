"""Rectangles of live parameters: what the trainer's and the engine's side of a refit share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from balcap_mega.rollout.refit.transfers import Place

CHECKSUM_CHUNK = 2**22


class CorruptPieces(ValueError):
    """Pieces that are not what was sent."""


@dataclass(frozen=True)
class Write:
    """`values` [rows, cols] go to `place` of the engine's parameters."""

    place: Place
    values: Tensor


def rectangle(parameter: Tensor, place: Place) -> Tensor:
    """A view of [rows, cols] of `parameter`, a vector being one column and a convolution [outputs, the rest]."""
    (top, bottom), (left, right) = place.rows, place.cols
    return parameter.detach().view(parameter.shape[0], -1)[top:bottom, left:right]


def checksums(rectangles: list[Tensor], dtype: torch.dtype) -> Tensor:
    """[n, 2] int64, on the CPU: of each rectangle's bits, as numbers of `dtype`, sum and sum weighted by position."""
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
