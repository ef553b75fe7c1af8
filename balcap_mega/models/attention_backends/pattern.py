"""The attention pattern of a packed row, as the two dense pieces it is made of."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby

from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class AttentionPattern:
    """Each segment attends to itself causally (`segments`), and the captions of a group to its prefix in full.

    total:    tokens inside segments, which stand at the front of the row; what follows is padding
    segments: (start, stop) of every segment that has tokens, in row order and without gaps
    captions: (start, stop) of each run of neighbouring segments that share a prefix
    prefixes: (start, stop) of the prefix which the run at the same place attends to
    """

    total: int
    segments: tuple[Range, ...]
    captions: tuple[Range, ...]
    prefixes: tuple[Range, ...]

    def pairs(self) -> int:
        """Query-key pairs inside the pattern: one head's work in one layer is 4·d FLOPs a pair, forward."""
        causal = sum((stop - start) * (stop - start + 1) // 2 for start, stop in self.segments)
        return causal + sum((b - a) * (d - c) for (a, b), (c, d) in zip(self.captions, self.prefixes))


def attention_pattern(segments: Tensor) -> AttentionPattern:
    """The pattern of the [M, 4] rows (start, stop, prefix_start, prefix_stop) of a `PackedRow`.

    Keep `segments` on the host: a device tensor is copied back, which waits for the device, at every layer.
    Raises ValueError where segments leave gaps, overlap, or attend to tokens that come after them.
    """
    return _pattern_of(tuple(map(tuple, segments.tolist())))


@lru_cache(maxsize=256)
def _pattern_of(segments: tuple[tuple[int, int, int, int], ...]) -> AttentionPattern:
    end = 0
    for start, stop, prefix_start, prefix_stop in segments:
        if (
            start != end
            or stop < start
            or not (prefix_start == prefix_stop or 0 <= prefix_start < prefix_stop <= start)
        ):
            raise ValueError(
                f"segment {(start, stop, prefix_start, prefix_stop)} must begin at {end}, where the one before "
                "it ends, and its prefix must lie before it"
            )
        end = stop
    filled = [segment for segment in segments if segment[0] < segment[1]]
    captions, prefixes = [], []
    for prefix, run in groupby(filled, key=lambda segment: segment[2:]):
        if prefix[0] < prefix[1]:
            run = list(run)
            captions.append((run[0][0], run[-1][1]))
            prefixes.append(prefix)
    return AttentionPattern(end, tuple(segment[:2] for segment in filled), tuple(captions), tuple(prefixes))


def lengths(ranges: tuple[Range, ...]) -> list[int]:
    return [stop - start for start, stop in ranges]


def offsets(ranges: tuple[Range, ...]) -> list[int]:
    """0 and the running total of the ranges' lengths: `cu_seqlens` of the ranges laid end to end."""
    return [0, *accumulate(lengths(ranges))]
