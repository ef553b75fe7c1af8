"""Which rank sends which rectangle of which weight to whom: worked out on every rank alone, the same on all.

The two tables of `balcap_mega.models.huggingface.mapping` say where each rectangle of a Hugging Face tensor stands, in
Megatron's parameters on one side and in vLLM's on the other. Their intersections are the pieces to move. A rank that
holds what it wants copies it; otherwise the holder that has sent least so far sends it. No rank receives more than it
lacks.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from balcap_mega.models.huggingface.table import Block, Span


@dataclass(frozen=True)
class Place:
    """Rows and columns of a parameter, a vector being one column and a convolution [outputs, the rest]."""

    parameter: str
    rows: Span
    cols: Span


@dataclass(frozen=True)
class Piece:
    """A rectangle of the Hugging Face tensor `hf_name` that stands at `source` on one rank and goes to `target`."""

    hf_name: str
    source_rank: int
    source: Place
    target_rank: int
    target: Place

    @property
    def shape(self) -> tuple[int, int]:
        (top, bottom), (left, right) = self.source.rows, self.source.cols
        return bottom - top, right - left

    @property
    def elements(self) -> int:
        rows, columns = self.shape
        return rows * columns


@dataclass(frozen=True)
class Bucket:
    """The pieces of one exchange that concern one rank, each list in an order that all ranks agree on.

    local:    from this rank to itself
    sends:    from this rank, by target rank
    receives: to this rank, by source rank
    """

    local: tuple[Piece, ...]
    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]

    @property
    def send_elements(self) -> int:
        return sum(piece.elements for piece in self.sends)

    @property
    def receive_elements(self) -> int:
        return sum(piece.elements for piece in self.receives)


@dataclass(frozen=True)
class Transfers:
    """One rank's part of a refit, as many buckets on every rank.

    lower_bound_elements: what this rank's engine needs and this rank does not hold: nobody can receive fewer
    target_elements:      how much of each vLLM parameter of this rank is written
    kept_elements:        how much of each is left as it was loaded (frozen weights)
    """

    rank: int
    buckets: tuple[Bucket, ...]
    lower_bound_elements: int
    target_elements: dict[str, int]
    kept_elements: dict[str, int]

    @property
    def received_elements(self) -> int:
        return sum(bucket.receive_elements for bucket in self.buckets)

    @property
    def sent_elements(self) -> int:
        return sum(bucket.send_elements for bucket in self.buckets)

    @property
    def local_elements(self) -> int:
        return sum(piece.elements for bucket in self.buckets for piece in bucket.local)

    @property
    def buffer_elements(self) -> int:
        """The largest bucket's sends and receives together; two such buckets live at a time."""
        return max((bucket.send_elements + bucket.receive_elements for bucket in self.buckets), default=0)


def find_transfers(
    sources: Sequence[Sequence[Block]],
    targets: Sequence[Sequence[Block]],
    *,
    rank: int,
    bucket_elements: int,
    skip: Collection[str] = (),
) -> Transfers:
    """Work out how every rank r gets the blocks of `targets[r]` from the blocks of `sources`; return `rank`'s part.

    sources:         for each rank, its Megatron table; blocks of one tensor are either equal or disjoint
    targets:         for each rank, its vLLM table
    bucket_elements: a bucket is closed before any rank would send and receive, or copy, more than this in it
    skip:            Hugging Face tensors that stay as they are (frozen weights)

    Raises ValueError for a target that the sources do not cover.
    """
    held, wanted = _by_tensor(sources, skip), _by_tensor(targets, skip)
    packer = _BucketPacker(rank, bucket_elements)
    for name in _interleaved(held, wanted):
        packer.add(_TensorExchange(name, held.get(name, {}), wanted[name]))
    target_elements: dict[str, int] = defaultdict(int)
    lower_bound = 0
    for name, blocks in wanted.items():
        for block, ranks in blocks.items():
            if rank not in ranks:
                continue
            for place in ranks[rank]:
                target_elements[place.parameter] += _area(block)
            own = sum(_area(_intersection(block, other)) for other, at in held[name].items() if rank in at)
            lower_bound += (_area(block) - own) * len(ranks[rank])
    kept = Counter()
    for block in targets[rank]:
        if block.hf_name in skip:
            kept[block.parameter] += _area((block.rows, block.cols))
    return Transfers(rank, packer.finish(), lower_bound, dict(target_elements), dict(kept))


Rectangle = tuple[Span, Span]
"""(rows, columns) of a Hugging Face tensor."""

Holders = dict[Rectangle, dict[int, list[Place]]]
"""For one tensor: rectangle -> rank -> that rank's places of it."""


def _by_tensor(tables: Sequence[Sequence[Block]], skip: Collection[str]) -> dict[str, Holders]:
    tensors: dict[str, Holders] = {}
    for rank, blocks in enumerate(tables):
        for block in blocks:
            if block.hf_name not in skip and _area((block.hf_rows, block.hf_cols)):
                ranks = tensors.setdefault(block.hf_name, {}).setdefault((block.hf_rows, block.hf_cols), {})
                ranks.setdefault(rank, []).append(Place(block.parameter, block.rows, block.cols))
    return tensors


def _interleaved(held: dict[str, Holders], wanted: dict[str, Holders]) -> list[str]:
    """The tensors' names, ordered so that neighbours come from different holders, such as pipeline stages.

    In the tables' own order one stage after another would send, while the links of the other stages are idle.
    """
    groups: dict[frozenset[int], list[str]] = defaultdict(list)
    for name in wanted:
        groups[frozenset(rank for at in held.get(name, {}).values() for rank in at)].append(name)
    turns = [(place / len(names), name) for names in groups.values() for place, name in enumerate(names)]
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def _area(rectangle: Rectangle) -> int:
    (top, bottom), (left, right) = rectangle
    return max(bottom - top, 0) * max(right - left, 0)


def _intersection(one: Rectangle, other: Rectangle) -> Rectangle:
    return (
        (max(one[0][0], other[0][0]), min(one[0][1], other[0][1])),
        (max(one[1][0], other[1][0]), min(one[1][1], other[1][1])),
    )


def _cut(place: Place, whole: Rectangle, part: Rectangle) -> Place:
    """The place of `part`, a rectangle within `whole`, which is at `place`."""
    (top, bottom), (left, right) = part
    row, col = place.rows[0] - whole[0][0], place.cols[0] - whole[1][0]
    return Place(place.parameter, (top + row, bottom + row), (left + col, right + col))


@dataclass(frozen=True)
class _TensorExchange:
    """All pieces of one tensor, within any band of its rows."""

    name: str
    held: Holders
    wanted: Holders

    @property
    def rows(self) -> Span:
        spans = [rows for rows, _ in self.wanted]
        return min(start for start, _ in spans), max(stop for _, stop in spans)

    def pieces(self, band: Span, sent: dict[int, int]) -> list[Piece]:
        """sent: elements that each rank has sent so far, by which the sender of a piece is chosen."""
        sent = defaultdict(int, sent)
        return [piece for target in self.wanted for piece in self._pieces_of(target, band, sent)]

    def _pieces_of(self, target: Rectangle, band: Span, sent: dict[int, int]) -> Iterator[Piece]:
        wanted_part = _intersection(target, (band, target[1]))
        covered = 0
        for source, holders in self.held.items():
            part = _intersection(wanted_part, source)
            if not _area(part):
                continue
            covered += _area(part)
            for target_rank, places in self.wanted[target].items():
                for place in places:
                    sender = target_rank if target_rank in holders else min(holders, key=lambda r: (sent[r], r))
                    if sender != target_rank:
                        sent[sender] += _area(part)
                    yield Piece(
                        self.name,
                        sender,
                        _cut(holders[sender][0], source, part),
                        target_rank,
                        _cut(place, target, part),
                    )
        if covered != _area(wanted_part):
            raise ValueError(
                f"{self.name}: the engine needs rows and columns {wanted_part}, of which the trainer's ranks hold "
                f"{covered} of {_area(wanted_part)} elements"
            )


class _BucketPacker:
    """Fills buckets with tensors, in bands of rows where a tensor is too large for one."""

    def __init__(self, rank: int, limit: int):
        self.rank, self.limit = rank, limit
        self.buckets: list[Bucket] = []
        self.sent: dict[int, int] = {}
        self._open()

    def add(self, exchange: _TensorExchange) -> None:
        start, last = exchange.rows
        while start < last:
            stop = last
            while (pieces := self._fitting(exchange, (start, stop))) is None:
                stop = start + (stop - start) // 2
            for piece in pieces:
                if piece.source_rank != piece.target_rank:
                    self.sent[piece.source_rank] = self.sent.get(piece.source_rank, 0) + piece.elements
                if self.rank in (piece.source_rank, piece.target_rank):
                    self.own.append(piece)
            start = stop

    def finish(self) -> tuple[Bucket, ...]:
        self._close()
        return tuple(self.buckets)

    def _fitting(self, exchange: _TensorExchange, band: Span) -> list[Piece] | None:
        """The band's pieces, counted into the open bucket or a new one; None where only fewer rows fit a bucket."""
        pieces = exchange.pieces(band, self.sent)
        load = _load(pieces)
        single_row = band[1] - band[0] == 1
        if max(load.values()) > self.limit and not single_row:
            return None
        if self.load and max((self.load + load).values()) > self.limit:
            self._close()
        self.load += load
        return pieces

    def _open(self) -> None:
        self.load: Counter[tuple[int, bool]] = Counter()
        self.own: list[Piece] = []

    def _close(self) -> None:
        local = [piece for piece in self.own if piece.source_rank == piece.target_rank]
        sends = [piece for piece in self.own if piece.source_rank == self.rank != piece.target_rank]
        receives = [piece for piece in self.own if piece.target_rank == self.rank != piece.source_rank]
        sends.sort(
            key=lambda piece: piece.target_rank
        )  # stable: within a rank pair both sides keep the order of `_interleaved`
        receives.sort(key=lambda piece: piece.source_rank)
        self.buckets.append(Bucket(tuple(local), tuple(sends), tuple(receives)))
        self._open()


def _load(pieces: list[Piece]) -> Counter[tuple[int, bool]]:
    """Elements by (rank, whether they go over the wire): what a rank sends and receives, and what it copies."""
    load: Counter[tuple[int, bool]] = Counter()
    for piece in pieces:
        if piece.source_rank == piece.target_rank:
            load[piece.target_rank, False] += piece.elements
        else:
            load[piece.source_rank, True] += piece.elements
            load[piece.target_rank, True] += piece.elements
    return load
