"""FlashAttention's variable-length kernels as PyTorch ships them, two launches forward and two backward.

`torch.nn.attention.activate_flash_attention_impl("FA3" or "FA4")` puts a newer FlashAttention, where installed, behind
the same operators; PyTorch's own is FlashAttention-2. Needs bfloat16 or float16 on CUDA and d of at most 256.
"""

from functools import lru_cache

import torch
from torch import Tensor

from balcap_mega.models.attention_backends.merged import MergedAttention
from balcap_mega.models.attention_backends.pattern import AttentionPattern, Range, lengths, offsets


@lru_cache(maxsize=256)
def _offsets(ranges: tuple[Range, ...], device: torch.device) -> Tensor:
    """int32 `cu_seqlens` on the device: copied once a row, read by all of its layers."""
    return torch.tensor(offsets(ranges), dtype=torch.int32).to(device, non_blocking=True)


class _FlashKernel:
    @staticmethod
    def _sequences(query_ranges, key_ranges, device) -> tuple[Tensor, Tensor, int, int]:
        longest_query, longest_key = max(lengths(query_ranges)), max(lengths(key_ranges))
        return _offsets(query_ranges, device), _offsets(key_ranges, device), longest_query, longest_key

    @classmethod
    def forward(cls, query, key, value, query_ranges, key_ranges, causal, scale):
        sequences = cls._sequences(query_ranges, key_ranges, query.device)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *sequences, 0.0, causal, False, scale=scale
        )
        return output, lse

    @classmethod
    def backward(cls, grad, query, key, value, output, lse, query_ranges, key_ranges, causal, scale):
        sequences = cls._sequences(query_ranges, key_ranges, query.device)
        no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty(0, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad, query, key, value, output, lse, *sequences, 0.0, causal, no_dropout_state, unused, scale=scale
        )


def attention(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    return MergedAttention.apply(query, key, value, pattern, scale, _FlashKernel)
