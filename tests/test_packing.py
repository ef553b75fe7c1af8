"""Packing: every response token once, positions and segments right, rows within their bound, ranks in balance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap_mega.errors import UserError
from balcap_mega.packing.assign import GroupLengths, assign_rows
from balcap_mega.packing.build import PackingGroup, build_row


def make_groups(lengths: list[tuple[int, list[int]]]) -> list[PackingGroup]:
    """Groups whose tokens are all distinct, with image-like positions that end below the prefix's length."""
    fresh, groups, first = iter(range(1, 1_000_000)), [], 0
    for prefix, captions in lengths:
        positions = torch.arange(prefix).expand(3, -1).clone()
        positions[:, prefix // 3 :] //= 2
        prompt = [next(fresh) for _ in range(prefix)]
        responses = [[next(fresh) for _ in range(caption)] for caption in captions]
        groups.append(PackingGroup(prompt, positions, responses, first))
        first += len(captions)
    return groups


def assign_and_build(groups, *, data_size=1, row_tokens=64, pad_to=1, shared_prefix=True):
    assignment = assign_rows(
        [group.lengths for group in groups],
        row_tokens=row_tokens,
        hidden_size=8,
        data_size=data_size,
        pad_to=pad_to,
        shared_prefix=shared_prefix,
    )
    rows = [[build_row(row, groups, pad_to=pad_to) for row in microbatches] for microbatches in assignment.rows]
    return assignment, rows


def context_of(row, response: int) -> tuple[list[int], list[list[int]]]:
    """Tokens, and their positions, that the hidden state of a response token has seen, by the row's segments."""
    at = int(row.hidden_rows[response])
    start, _, *prefix = next(s for s in row.segments.tolist() if s[0] <= at < s[1])
    seen = [*range(*prefix), *range(start, at + 1)]
    return row.tokens[seen].tolist(), row.position_ids[:, seen].tolist()


group_lengths = st.lists(
    st.tuples(st.integers(1, 20), st.lists(st.integers(0, 30), min_size=0, max_size=5)), min_size=1, max_size=7
)


@settings(max_examples=60, deadline=None)
@given(group_lengths, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 8]), st.booleans())
def test_every_response_token_sees_its_own_prompt_and_caption(lengths, data_size, pad_to, shared_prefix):
    groups = make_groups(lengths)
    assignment, ranks = assign_and_build(groups, data_size=data_size, pad_to=pad_to, shared_prefix=shared_prefix)
    of_sequence = {
        group.first_sequence + index: (group, caption)
        for group in groups
        for index, caption in enumerate(group.captions)
    }
    seen = []
    assert len({len(rows) for rows in assignment.rows}) == 1
    for row in (row for rows in ranks for row in rows):
        assert len(row.tokens) <= 64 and len(row.tokens) % pad_to == 0
        for response in range(len(row.targets)):
            sequence, place = int(row.sequence_ids[response]), int(row.token_index[response])
            group, caption = of_sequence[sequence]
            tokens, positions = context_of(row, response)
            assert tokens == [*group.prompt_token_ids, *caption[:place]]
            follow = [int(group.position_ids.max()) + 1 + step for step in range(place)]
            assert positions == [[*section, *follow] for section in group.position_ids.tolist()]
            assert row.targets[response] == caption[place]
            seen.append((sequence, place))
    assert sorted(seen) == [(s, t) for s, (_, caption) in sorted(of_sequence.items()) for t in range(len(caption))]
    assert assignment.tokens == sum(len(row.tokens) for rows in ranks for row in rows)


def test_the_prefix_stands_once():
    groups = make_groups([(20, [5, 1, 10])])
    _, [[row]] = assign_and_build(groups, pad_to=8)
    assert len(row.tokens) == 40  # 20 + 4 + 0 + 9 tokens, padded to a multiple of 8
    assert row.images == (0,)
    assert row.segments.tolist() == [[0, 20, 0, 0], [20, 24, 0, 20], [24, 33, 0, 20]]
    assert row.hidden_rows.tolist() == [19, 20, 21, 22, 23, 19, 19, *range(24, 33)]


def test_unshared_repeats_the_prefix():
    groups = make_groups([(20, [5, 1])])
    assignment, [rows] = assign_and_build(groups, shared_prefix=False)
    assert assignment.tokens == assignment.unshared_tokens == 44
    assert rows[0].images == (0, 0)
    assert rows[0].segments.tolist() == [[0, 24, 0, 0], [24, 44, 0, 0]]


def test_a_group_too_large_for_a_row_is_split_with_its_prefix_repeated():
    groups = make_groups([(20, [25, 25, 25])])
    assignment, [rows] = assign_and_build(groups)
    assert [len(row.tokens) for row in rows] == [44, 44, 44]
    assert all(row.images == (0,) for row in rows)
    assert assignment.padding == 0


def test_ranks_share_the_work():
    generator = torch.Generator().manual_seed(0)
    captions = torch.randint(40, 400, (64, 8), generator=generator).tolist()
    prefixes = torch.randint(300, 1400, (64,), generator=generator).tolist()
    lengths = [GroupLengths(prefix, tuple(group)) for prefix, group in zip(prefixes, captions)]
    assignment = assign_rows(lengths, row_tokens=8192, hidden_size=2048, data_size=8, pad_to=8)
    assert assignment.imbalance < 1.02
    assert assignment.padding < 0.01 * assignment.tokens
    assert assignment.tokens < 0.35 * assignment.unshared_tokens
    assert assignment == assign_rows(lengths, row_tokens=8192, hidden_size=2048, data_size=8, pad_to=8)


def test_one_group_is_split_rather_than_leaving_a_rank_idle():
    assignment = assign_rows([GroupLengths(10, (100,) * 8)], row_tokens=2048, hidden_size=64, data_size=2)
    assert [len(rows[0][0].captions) for rows in assignment.rows] == [4, 4]


def test_a_rank_without_work_gets_an_empty_row():
    _, ranks = assign_and_build(make_groups([(5, [3])]), data_size=2, pad_to=4)
    empty = ranks[1][0]
    assert (len(empty.tokens), len(empty.segments), len(empty.targets), empty.images) == (4, 0, 0, ())


def test_a_caption_that_fits_no_row_is_refused():
    with pytest.raises(UserError, match=r"prompt 1 .* 70 tokens.*packing\.row_tokens to 72"):
        assign_rows([GroupLengths(4, (4,)), GroupLengths(60, (11,))], row_tokens=64, hidden_size=8, pad_to=8)
