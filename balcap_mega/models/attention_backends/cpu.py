"""PyTorch's fused CPU attention, one call a segment and one a group's captions; no mask is ever built."""

import torch
from torch import Tensor

from balcap_mega.models.attention_backends.merged import MergedAttention
from balcap_mega.models.attention_backends.pattern import AttentionPattern, Range, lengths

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(tensor: Tensor, ranges: tuple[Range, ...]) -> list[Tensor]:
    """[T, H, d] to one [1, H, length, d] view a range."""
    return [part.transpose(0, 1).unsqueeze(0) for part in tensor.split(lengths(ranges))]


class _CpuKernel:
    @staticmethod
    def forward(query, key, value, query_ranges, key_ranges, causal, scale):
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse_type = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(query.shape[:2], dtype=lse_type).t()
        parts = zip(
            _heads_first(query, query_ranges),
            _heads_first(key, key_ranges),
            _heads_first(value, key_ranges),
            output.split(lengths(query_ranges)),
            lse.split(lengths(query_ranges), dim=1),
        )
        for q, k, v, output_part, lse_part in parts:
            attended, log_sum_exp = _forward(q, k, v, 0.0, causal, scale=scale)
            output_part.copy_(attended[0].transpose(0, 1))
            lse_part.copy_(log_sum_exp[0])
        return output, lse

    @staticmethod
    def backward(grad, query, key, value, output, lse, query_ranges, key_ranges, causal, scale):
        queries = zip(
            _heads_first(grad, query_ranges),
            _heads_first(query, query_ranges),
            _heads_first(output, query_ranges),
            lse.unsqueeze(0).split(lengths(query_ranges), dim=2),
        )
        keys = zip(_heads_first(key, key_ranges), _heads_first(value, key_ranges))
        gradients = [
            [part[0].transpose(0, 1) for part in _backward(g, q, k, v, o, log_sum_exp, 0.0, causal, scale=scale)]
            for (g, q, o, log_sum_exp), (k, v) in zip(queries, keys)
        ]
        return tuple(torch.cat(tensors) for tensors in zip(*gradients))


def attention(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, scale: float) -> Tensor:
    return MergedAttention.apply(query, key, value, pattern, scale, _CpuKernel)
