"""Which rectangle of which Hugging Face tensor stands where in one rank's parameters: what `mapping` is made of.

Every tensor is a matrix here, [shape[0], product of the rest]; a vector has one column.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Span = tuple[int, int]
"""Half-open: [start, stop)."""

Piece = tuple[str, int, int]
"""Rows [start, stop) of a Hugging Face tensor, at full width."""


def linear(name: str, rows: int, cols: int, *, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a linear's tensors."""
    yield f"{name}.weight", (rows, cols)
    if bias:
        yield f"{name}.bias", (rows,)


@dataclass(frozen=True)
class Block:
    """Rectangle [hf_rows, hf_cols] of the Hugging Face tensor `hf_name` is [rows, cols] of this rank's `parameter`."""

    hf_name: str
    hf_rows: Span
    hf_cols: Span
    parameter: str
    rows: Span
    cols: Span


class Table:
    """Collects blocks of one tensor-parallel rank; each method places Hugging Face tensors in one parameter."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], tensor_rank: int, tensor_size: int):
        self.shapes, self.rank, self.size = shapes, tensor_rank, tensor_size
        self.blocks: list[Block] = []

    def stack(self, parameter: str, pieces: Iterable[Piece]) -> None:
        """The pieces, one below the other."""
        row = 0
        for name, start, stop in pieces:
            if start == stop:  # a vocabulary that ends before this rank's rows begin
                continue
            cols = (0, math.prod(self.shapes[name][1:]))
            self.blocks.append(Block(name, (start, stop), cols, parameter, (row, row + stop - start), cols))
            row += stop - start

    def whole(self, parameter: str, name: str) -> None:
        self.stack(parameter, [(name, 0, self.shapes[name][0])])

    def rows(self, parameter: str, name: str) -> None:
        """Column-parallel: this rank's even share of the output channels, which are the rows."""
        self.stack(parameter, [self.rows_of(name)])

    def columns(self, parameter: str, name: str) -> None:
        """Row-parallel: this rank's even share of the input channels, which are the columns."""
        rows, total = self.shapes[name]
        width = _divide(total, self.size, name)
        start = self.rank * width
        self.blocks.append(Block(name, (0, rows), (start, start + width), parameter, (0, rows), (0, width)))

    def column_parallel(self, parameter: str, name: str) -> None:
        """A linear; its bias, if it has one, is cut with its output channels."""
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in self.shapes:
                self.rows(f"{parameter}.{kind}", f"{name}.{kind}")

    def row_parallel(self, parameter: str, name: str) -> None:
        """A linear; its bias, if it has one, is whole on every rank."""
        self.columns(f"{parameter}.weight", f"{name}.weight")
        if f"{name}.bias" in self.shapes:
            self.whole(f"{parameter}.bias", f"{name}.bias")

    def vocabulary(self, parameter: str, name: str, rows: int) -> None:
        """Vocabulary-parallel: `rows` rows a rank, of which those past the vocabulary's end are padding."""
        vocab_size = self.shapes[name][0]
        start, stop = (min(edge * rows, vocab_size) for edge in (self.rank, self.rank + 1))
        self.stack(parameter, [(name, start, stop)])

    def rows_of(self, name: str, share: int | None = None, shares: int | None = None) -> Piece:
        """Rows of the `share`-th of `shares` even shares: this rank's own unless told."""
        share, shares = (self.rank, self.size) if shares is None else (share, shares)
        rows = _divide(self.shapes[name][0], shares, name)
        return name, share * rows, (share + 1) * rows

    def thirds(self, name: str) -> list[Piece]:
        """This rank's share of each third of the rows: queries, keys and values that one tensor holds."""
        return [self.rows_of(name, part * self.size + self.rank, 3 * self.size) for part in range(3)]

    def share_of(self, pieces: list[Piece]) -> Iterator[Piece]:
        """This rank's even share of the rows of all pieces, stacked in their order."""
        total = sum(stop - start for _, start, stop in pieces)
        length = _divide(total, self.size, pieces[0][0])
        first, last, row = self.rank * length, (self.rank + 1) * length, 0
        for name, start, stop in pieces:
            low, high = max(start, start + first - row), min(stop, start + last - row)
            if low < high:
                yield name, low, high
            row += stop - start


def _divide(rows: int, size: int, name: str) -> int:
    if rows % size:
        raise ValueError(f"{name}: {rows} cannot be cut into {size} even parts")
    return rows // size
