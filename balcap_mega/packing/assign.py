"""Assigns captions to rows and rows to data-parallel ranks, from their lengths alone.

Every rank computes the assignment of the whole step, which is the same on all, and then builds only its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from balcap_mega.errors import UserError


@dataclass(frozen=True)
class GroupLengths:
    """Numbers of tokens: of a group's prefix (the prompt with its image tokens expanded), and of each response."""

    prefix: int
    captions: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Captions (indices within their group, ascending) that share one copy of their group's prefix."""

    group: int
    captions: tuple[int, ...]


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class RowAssignment:
    """rows[rank][microbatch] is a row, which may be empty; every rank has the same number of rows.

    tokens:          row tokens over all ranks, padding included
    padding:         of those, tokens that pad rows to their multiple
    unshared_tokens: row tokens of the same captions if each had a copy of its prefix
    imbalance:       work of the costliest rank over the mean of all ranks, at least 1
    """

    rows: tuple[tuple[Row, ...], ...]
    tokens: int
    padding: int
    unshared_tokens: int
    imbalance: float


def assign_rows(
    groups: Sequence[GroupLengths],
    *,
    row_tokens: int,
    hidden_size: int,
    data_size: int = 1,
    pad_to: int = 1,
    shared_prefix: bool = True,
) -> RowAssignment:
    """Pack groups into rows of at most `row_tokens` tokens and spread rows over `data_size` ranks, balanced by cost.

    A row's length is padded to a multiple of `pad_to`. Cost counts a layer's forward FLOPs (see `_Costs`). A group too
    large for one row is split into as few pieces as fit, its prefix repeated in each; so is one whose split evens the
    load out. `shared_prefix=False` gives every caption a prefix of its own.

    Raises UserError where a prefix with its longest caption exceeds `row_tokens`.
    """
    capacity = row_tokens // pad_to * pad_to
    costs = _Costs(groups, hidden_size)
    pieces = []
    for index, group in enumerate(groups):
        captions = tuple(caption for caption, length in enumerate(group.captions) if length)
        if not captions:
            continue
        longest = group.prefix + _added(max(group.captions))
        if longest > capacity:
            needed = -(-longest // pad_to) * pad_to
            raise UserError(
                f"prompt {index} with its longest caption takes {longest} tokens, and a row holds {capacity}",
                remedy=f"set packing.row_tokens to {needed} or more, or in a new run lower rollout.max_tokens",
            )
        if shared_prefix:
            pieces += _split(Piece(index, captions), costs, capacity)
        else:
            pieces += [Piece(index, (caption,)) for caption in captions]

    ranks = _distribute(pieces, costs, capacity, data_size)
    while data_size > 1 and (piece := _costliest_to_split(ranks, costs)):
        split = [*(other for other in pieces if other != piece), *_even_pieces(piece, costs, 2)]
        trial = _distribute(split, costs, capacity, data_size)
        if max(map(costs.rank, trial)) > 0.99 * max(map(costs.rank, ranks)):
            break
        pieces, ranks = split, trial

    used = [costs.tokens(row) for rows in ranks for row in rows]
    padded = sum(max(-(-tokens // pad_to), 1) * pad_to for tokens in used)
    loads = [costs.rank(rows) for rows in ranks]
    return RowAssignment(
        rows=ranks,
        tokens=padded,
        padding=padded - sum(used),
        unshared_tokens=sum(group.prefix + _added(caption) for group in groups for caption in group.captions),
        imbalance=max(loads) * data_size / sum(loads) if any(loads) else 1.0,
    )


def _added(caption: int) -> int:
    """Row tokens of a caption: its last token is only predicted, never read."""
    return max(caption - 1, 0)


class _Costs:
    """Numbers of tokens, and costs, of pieces, rows and ranks. The unit of cost is one query-key pair, 4·h FLOPs.

    A dense layer of about 12·h² weights costs a token 24·h² FLOPs, as much as 6·h pairs.
    """

    def __init__(self, groups: Sequence[GroupLengths], hidden_size: int):
        self.groups, self.token_cost = groups, 6 * hidden_size

    def caption(self, piece: Piece, caption: int) -> tuple[int, int]:
        """(tokens, cost) that a caption adds to its prefix."""
        group = self.groups[piece.group]
        tokens = _added(group.captions[caption])
        return tokens, tokens * (self.token_cost + group.prefix) + tokens * (tokens + 1) // 2

    def piece(self, piece: Piece) -> tuple[int, int]:
        """(tokens, cost) of a piece, its prefix included."""
        prefix = self.groups[piece.group].prefix
        added = [self.caption(piece, caption) for caption in piece.captions]
        cost = prefix * self.token_cost + prefix * (prefix + 1) // 2 + sum(cost for _, cost in added)
        return prefix + sum(tokens for tokens, _ in added), cost

    def tokens(self, row: Row) -> int:
        return sum(self.piece(piece)[0] for piece in row)

    def rank(self, rows: Sequence[Row]) -> int:
        return sum(self.piece(piece)[1] for row in rows for piece in row)


def _split(piece: Piece, costs: _Costs, capacity: int) -> list[Piece]:
    """Split into the fewest pieces of at most `capacity` tokens each, of about equal cost."""
    for count in range(1, len(piece.captions) + 1):
        pieces = _even_pieces(piece, costs, count)
        if all(costs.piece(part)[0] <= capacity for part in pieces):
            return pieces
    raise AssertionError("a prefix with one caption was found to fit")


def _even_pieces(piece: Piece, costs: _Costs, count: int) -> list[Piece]:
    """Split into `count` pieces: each caption, the costliest first, goes to the piece that is cheapest so far."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for caption in sorted(piece.captions, key=lambda caption: (-costs.caption(piece, caption)[1], caption)):
        cheapest = loads.index(min(loads))
        shares[cheapest].append(caption)
        loads[cheapest] += costs.caption(piece, caption)[1]
    return [Piece(piece.group, tuple(sorted(share))) for share in shares]


def _costliest_to_split(ranks: Sequence[Sequence[Row]], costs: _Costs) -> Piece | None:
    heaviest = max(ranks, key=costs.rank)
    pieces = [piece for row in heaviest for piece in row if len(piece.captions) > 1]
    return max(pieces, key=lambda piece: costs.piece(piece)[1], default=None)


def _distribute(pieces: list[Piece], costs: _Costs, capacity: int, data_size: int) -> tuple[tuple[Row, ...], ...]:
    """Assign pieces to the fewest rows that hold them, then rows to ranks, each time the costliest first."""
    measured = [(*costs.piece(piece), piece) for piece in pieces]
    measured.sort(key=lambda entry: (-entry[1], entry[2].group, entry[2].captions))
    total = sum(tokens for tokens, _, _ in measured)
    count = data_size * max(-(-total // (capacity * data_size)), 1)
    while (rows := _fill(measured, count, capacity)) is None:
        count += data_size
    rows.sort(key=lambda row: -row[0])
    loads = [0] * data_size
    ranks: list[list[Row]] = [[] for _ in range(data_size)]
    for first in range(0, len(rows), data_size):
        lightest_first = sorted(range(data_size), key=lambda rank: loads[rank])
        for rank, (cost, row) in zip(lightest_first, rows[first : first + data_size]):
            ranks[rank].append(row)
            loads[rank] += cost
    return tuple(map(tuple, ranks))


def _fill(measured: list[tuple[int, int, Piece]], count: int, capacity: int) -> list[tuple[int, Row]] | None:
    """`count` rows as (cost, pieces in group order); None if a piece fits no row."""
    rows: list[list[Piece]] = [[] for _ in range(count)]
    tokens, loads = [0] * count, [0] * count
    for size, cost, piece in measured:
        with_room = [row for row in range(count) if tokens[row] + size <= capacity]
        if not with_room:
            return None
        row = min(with_room, key=lambda row: loads[row])
        rows[row].append(piece)
        tokens[row] += size
        loads[row] += cost
    in_order = [tuple(sorted(row, key=lambda piece: (piece.group, piece.captions))) for row in rows]
    return list(zip(loads, in_order))
