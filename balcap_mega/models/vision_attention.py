"""Attention of a packed vision tower: every window or image to itself, in one call for all segments of one length.

transformers calls PyTorch's attention once for each window, hundreds of times a layer, unless flash-attn is installed.
Windows have few distinct lengths (whole ones, and those cut at two edges), so they are batched by length instead: a
handful of calls, on any device and in any dtype.
"""

from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    cu_seq_lens_q:     [segments + 1] where each segment starts, and T
    Returns [1, T, heads, d], as transformers' attention functions do.
    """
    starts_by_length = defaultdict(list)
    bounds = cu_seq_lens_q.tolist()
    for start, stop in pairwise(bounds):
        starts_by_length[stop - start].append(start)
    outputs, places = [], []
    for length, starts in starts_by_length.items():
        rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(query.device)
        segments = (
            states[0].index_select(1, rows).unflatten(1, (len(starts), length)).transpose(0, 1)
            for states in (query, key, value)
        )
        output = nn.functional.scaled_dot_product_attention(*segments, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
        places.append(rows)
    order = torch.cat(places).argsort()
    return torch.cat(outputs).index_select(0, order)[None], None


ALL_ATTENTION_FUNCTIONS.register(BATCHED_SEGMENTS, batched_segment_attention)
