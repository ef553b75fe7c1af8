"""Shared-prefix attention against a dense mask in float64, values and gradients, odd shapes included."""

import pytest
import torch

from balcap_mega.models.attention_backends import find_backend
from balcap_mega.models.attention_backends.plan import plan_attention


def row_segments(groups: list[tuple[int, list[int]]]) -> torch.Tensor:
    """[(prefix length, caption lengths), ...] to segments."""
    rows, at = [], 0
    for prefix, captions in groups:
        start = at
        rows.append((at, at := at + prefix, 0, 0))
        rows += [(at, at := at + caption, start, start + prefix) for caption in captions]
    return torch.tensor(rows, dtype=torch.int32)


def dense_mask(segments: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in segments.tolist():
        mask[start:stop, prefix_start:prefix_stop] = True
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    return mask


def dense_attention(query, key, value, segments, scale):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    mask = dense_mask(segments, len(query))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value)


SHAPES = {
    "one group": [(7, [5, 3, 9])],
    "captions of length 1": [(11, [1, 1, 1, 4])],
    "empty captions": [(5, [0, 3, 0]), (4, [0]), (3, [2])],
    "very unequal": [(3, [1, 150, 2])],
    "one segment fills the row": [(64, [])],
    "several groups": [(17, [3, 1]), (1, [2, 2]), (33, [13]), (9, [])],
}


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("heads,key_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_dense_mask(backend, shape, padding, heads, key_heads, dtype, tolerance):
    torch.manual_seed(0)
    segments = row_segments(SHAPES[shape])
    size, width, scale = int(segments[-1, 1]) + padding, 8, 0.4
    exact = [torch.randn(size, h, width, dtype=torch.float64) for h in (heads, key_heads, key_heads)]
    grad = torch.randn(size, heads, width, dtype=torch.float64)
    ours = [tensor.to(dtype).requires_grad_() for tensor in exact]
    exact = [tensor.requires_grad_() for tensor in exact]

    expected = dense_attention(*exact, segments, scale)
    actual = find_backend(backend)(*ours, plan_attention(segments), scale)
    expected.backward(grad)
    actual.backward(grad.to(dtype))

    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
    if padding:
        assert not actual[-padding:].any()
    for mine, theirs in zip(ours, exact):
        torch.testing.assert_close(
            mine.grad.double(), theirs.grad, rtol=0, atol=tolerance * theirs.grad.abs().max().item()
        )
        if padding:
            assert not mine.grad[-padding:].any()
