"""Attention of a packed vision tower: every window or image to itself, in one call for all segments of one length.

transformers calls PyTorch's attention once for each window, hundreds of times a layer, unless flash-attn is installed.
Windows have few distinct lengths (whole ones, and those cut at two edges), so they are batched by length instead: a
handful of calls, on any device and in any dtype.
"""

from collections import defaultdict
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from balcap_mega.parallel.transfer import to_device

BATCHED_SEGMENTS = "batched_segments_like_flash"
"""Its name in a transformers config: a tower passes cumulative lengths to whatever has "flash" in its name."""


def batched_segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **unused,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each segment.

    query, key, value: [1, heads, T, d]
    cu_seq_lens_q:     [segments + 1] where each segment starts, and T; on the host, as each layer reads it there
    Returns [1, T, heads, d], as transformers' attention functions do.
    """
    batches, order = _by_length(tuple(cu_seq_lens_q.tolist()), query.device)
    outputs = []
    for length, rows in batches:
        segments = (
            states[0].index_select(1, rows).unflatten(1, (-1, length)).transpose(0, 1) for states in (query, key, value)
        )
        output = nn.functional.scaled_dot_product_attention(*segments, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order)[None], None


@lru_cache(maxsize=8)
def _by_length(bounds: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """For each length its segments' rows, and where the rows of all of them go back to; the same for many layers."""
    starts_by_length = defaultdict(list)
    for start, stop in pairwise(bounds):
        starts_by_length[stop - start].append(start)
    places = {
        length: (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()
        for length, starts in starts_by_length.items()
    }
    order = torch.cat(list(places.values())).argsort()
    return [(length, to_device(rows, device)) for length, rows in places.items()], to_device(order, device)


ALL_ATTENTION_FUNCTIONS.register(BATCHED_SEGMENTS, batched_segment_attention)
