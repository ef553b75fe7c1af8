"""Builds the tensors of one row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from balcap_mega.packing.assign import GroupLengths, Row
from balcap_mega.packing.rows import PackedRow


@dataclass(frozen=True)
class PackingGroup:
    """One prompt and its captions, as token ids.

    A supervised example is a group of one caption: the target's tokens and the end-of-sequence token.

    prompt_token_ids: [P], image tokens expanded
    position_ids:     [3, P] int64 rotary positions of the prompt (temporal, height, width)
    captions:         response token ids of each rollout
    first_sequence:   number of the group's first rollout among all rollouts of the step; the others follow it
    """

    prompt_token_ids: Sequence[int]
    position_ids: Tensor
    captions: Sequence[Sequence[int]]
    first_sequence: int

    @property
    def lengths(self) -> GroupLengths:
        return GroupLengths(len(self.prompt_token_ids), tuple(map(len, self.captions)))


def build_row(row: Row, groups: Sequence[PackingGroup] | Mapping[int, PackingGroup], *, pad_to: int = 1) -> PackedRow:
    """Build the tensors of `row`. `groups` needs only the groups that the row names.

    Each prefix is there once, followed by its captions without their last tokens. A caption's positions continue from
    the largest position of its prefix. A prefix with a single caption forms one causal segment with it.
    """
    writer = _RowWriter()
    for piece in row:
        group = groups[piece.group]
        prefix = writer.append(group.prompt_token_ids, group.position_ids)
        writer.images.append(piece.group)
        alone = len(piece.captions) == 1
        if not alone:
            writer.segments.append((*prefix, 0, 0))
        next_position = int(group.position_ids.max()) + 1
        for index in piece.captions:
            caption = group.captions[index]
            read = max(len(caption) - 1, 0)
            positions = torch.arange(next_position, next_position + read).expand(3, -1)
            start, stop = writer.append(caption[:read], positions)
            if alone:
                writer.segments.append((prefix[0], stop, 0, 0))
            elif read:
                writer.segments.append((start, stop, *prefix))
            writer.respond(caption, [prefix[1] - 1, *range(start, stop)], group.first_sequence + index)
    return writer.finish(pad_to)


class _RowWriter:
    def __init__(self):
        self.tokens: list[int] = []
        self.positions: list[Tensor] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.images: list[int] = []
        self.hidden_rows: list[int] = []
        self.targets: list[int] = []
        self.sequence_ids: list[int] = []
        self.token_index: list[int] = []

    def append(self, tokens: Sequence[int], positions: Tensor) -> tuple[int, int]:
        start = len(self.tokens)
        self.tokens += tokens
        self.positions.append(positions)
        return start, len(self.tokens)

    def respond(self, caption: Sequence[int], hidden_rows: list[int], sequence_id: int) -> None:
        count = len(caption)
        self.hidden_rows += hidden_rows[:count]
        self.targets += caption
        self.sequence_ids += [sequence_id] * count
        self.token_index += range(count)

    def finish(self, pad_to: int) -> PackedRow:
        padding = max(-(-len(self.tokens) // pad_to), 1) * pad_to - len(self.tokens)
        self.append([0] * padding, torch.zeros(3, padding, dtype=torch.int64))
        return PackedRow(
            tokens=torch.tensor(self.tokens),
            position_ids=torch.cat(self.positions, dim=1),
            segments=torch.tensor(self.segments, dtype=torch.int32).view(-1, 4),
            images=tuple(self.images),
            hidden_rows=torch.tensor(self.hidden_rows, dtype=torch.int64),
            targets=torch.tensor(self.targets, dtype=torch.int64),
            sequence_ids=torch.tensor(self.sequence_ids, dtype=torch.int64),
            token_index=torch.tensor(self.token_index, dtype=torch.int64),
        )
