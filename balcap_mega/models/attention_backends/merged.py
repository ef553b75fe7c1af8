"""Shared-prefix attention from two calls of a variable-length kernel, merged by their log-sum-exps.

With A the keys of a token's own segment and B those of its prefix,

    softmax over A ∪ B = w_A · softmax over A + w_B · softmax over B,   w_X = exp(lse_X - lse),  lse = log Σ_X exp lse_X

Backward needs no product rule for the merge: a flash kernel's backward recomputes probabilities as exp(score - lse), so
handed the *merged* output and log-sum-exp it yields each part's share of the gradient of the whole softmax.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from balcap_mega.models.attention_backends.pattern import AttentionPattern, Range, lengths


class VarlenKernel(Protocol):
    """Attention of sequences laid end to end: query [T_q, H, d], key and value [T_k, H_kv, d].

    The i-th of `query_ranges` attends to the i-th of `key_ranges` (lengths are what counts; the ranges are laid end to
    end, whatever their starts). `output` is [T_q, H, d], `lse` the natural log-sum-exp [H, T_q].
    """

    def forward(
        self, query, key, value, query_ranges: tuple[Range, ...], key_ranges: tuple[Range, ...], causal, scale
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad, query, key, value, output, lse, query_ranges, key_ranges, causal, scale
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _take(tensor: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The ranges of dimension 0, end to end; a view when there is one range."""
    parts = [tensor[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add(tensor: Tensor, ranges: tuple[Range, ...], update: Tensor) -> None:
    for (start, stop), part in zip(ranges, update.split(lengths(ranges))):
        tensor[start:stop] += part


class MergedAttention(torch.autograd.Function):
    """`apply(query [S, H, d], key [S, H_kv, d], value [S, H_kv, d], pattern, scale, kernel) -> [S, H, d]`."""

    @staticmethod
    def forward(ctx: Any, query, key, value, pattern: AttentionPattern, scale: float, kernel: VarlenKernel) -> Tensor:
        n = pattern.total
        output, lse = torch.zeros_like(query), None
        if n:
            own, lse = kernel.forward(query[:n], key[:n], value[:n], pattern.segments, pattern.segments, True, scale)
            output[:n] = own
        if pattern.captions:
            shared, shared_lse = kernel.forward(
                _take(query, pattern.captions),
                _take(key, pattern.prefixes),
                _take(value, pattern.prefixes),
                pattern.captions,
                pattern.prefixes,
                False,
                scale,
            )
            at = 0
            for start, stop in pattern.captions:
                taken = slice(at, at := at + stop - start)
                own_lse, prefix_lse = lse[:, start:stop].clone(), shared_lse[:, taken]
                lse[:, start:stop] = torch.logaddexp(own_lse, prefix_lse)
                weight = torch.sigmoid(prefix_lse - own_lse).t().unsqueeze(-1)  # w_B; w_A is 1 - w_B
                output[start:stop] = torch.lerp(
                    output[start:stop].to(weight.dtype), shared[taken].to(weight.dtype), weight
                )
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.pattern, ctx.scale, ctx.kernel = pattern, scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, output, lse = ctx.saved_tensors
        pattern, scale, kernel, n = ctx.pattern, ctx.scale, ctx.kernel, ctx.pattern.total
        gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        if n:
            own = kernel.backward(
                grad[:n],
                query[:n],
                key[:n],
                value[:n],
                output[:n],
                lse,
                pattern.segments,
                pattern.segments,
                True,
                scale,
            )
            for total, part in zip(gradients, own):
                total[:n] = part
        if pattern.captions:
            shared = kernel.backward(
                _take(grad, pattern.captions),
                _take(query, pattern.captions),
                _take(key, pattern.prefixes),
                _take(value, pattern.prefixes),
                _take(output, pattern.captions),
                _take(lse.t(), pattern.captions).t().contiguous(),
                pattern.captions,
                pattern.prefixes,
                False,
                scale,
            )
            for total, part, ranges in zip(gradients, shared, (pattern.captions, pattern.prefixes, pattern.prefixes)):
                _add(total, ranges, part)
        return *gradients, None, None, None
