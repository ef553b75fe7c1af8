"""FlexAttention with a block mask made from the segments: any CUDA dtype, one compiled kernel for all rows.

Blocks of 128 x 128 outside the pattern are skipped; those on its edges are computed and masked.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from balcap_mega.models.attention_backends.pattern import AttentionPattern


@lru_cache(maxsize=16)
def _block_mask(pattern: AttentionPattern, size: int, device: torch.device) -> BlockMask:
    """Padding forms one causal segment of its own: a row of scores without a key would be a softmax of nothing."""
    segment = torch.full((size,), -1, dtype=torch.int32)
    prefix_start, prefix_stop = torch.zeros(2, size, dtype=torch.int32)
    for index, (start, stop) in enumerate(pattern.segments):
        segment[start:stop] = index
    for (start, stop), (first, last) in zip(pattern.captions, pattern.prefixes):
        prefix_start[start:stop], prefix_stop[start:stop] = first, last
    segment, prefix_start, prefix_stop = (tensor.to(device) for tensor in (segment, prefix_start, prefix_stop))

    def attends(batch, head, query, key):
        own = (segment[query] == segment[key]) & (query >= key)
        return own | ((key >= prefix_start[query]) & (key < prefix_stop[query]))

    return create_block_mask(attends, B=None, H=None, Q_LEN=size, KV_LEN=size, device=str(device))


@lru_cache(maxsize=1)
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def attention(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    size, total = len(query), pattern.total
    kernel = _compiled() if query.is_cuda else flex_attention  # uncompiled it is dense: for checking, not for use
    output = kernel(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        block_mask=_block_mask(pattern, size, query.device),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output = output[0].transpose(0, 1)
    if total == size:
        return output
    return torch.cat([output[:total], output.new_zeros(size - total, *output.shape[1:])])
