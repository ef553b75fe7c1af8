"""Shared-prefix attention against a dense mask in float64, values and gradients, odd shapes included."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from balcap_mega.config.schema import ModelConfig
from balcap_mega.models.attention import SegmentAttention
from balcap_mega.models.attention_backends import find_backend
from balcap_mega.models.attention_backends.pattern import attention_pattern


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


@pytest.mark.parametrize("heads,key_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_dense_mask(shape, padding, heads, key_heads, dtype, tolerance):
    torch.manual_seed(0)
    segments = row_segments(SHAPES[shape])
    size, width, scale = int(segments[-1, 1]) + padding, 8, 0.4
    exact = [torch.randn(size, h, width, dtype=torch.float64) for h in (heads, key_heads, key_heads)]
    grad = torch.randn(size, heads, width, dtype=torch.float64)
    ours = [tensor.to(dtype).requires_grad_() for tensor in exact]
    exact = [tensor.requires_grad_() for tensor in exact]

    expected = dense_attention(*exact, segments, scale)
    actual = find_backend("cpu")(*ours, attention_pattern(segments), scale)
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


@pytest.mark.parametrize("shape", SHAPES)
def test_flex_block_mask_is_the_pattern(shape):
    """Forward only: FlexAttention has no backward on CPU."""
    torch.manual_seed(0)
    segments = row_segments(SHAPES[shape])
    inputs = [torch.randn(int(segments[-1, 1]) + 3, heads, 8) for heads in (4, 2, 2)]
    actual = find_backend("flex")(*inputs, attention_pattern(segments), 0.4)
    torch.testing.assert_close(actual, dense_attention(*inputs, segments, 0.4), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_flash_calls_fit_the_operators(shape):
    """Shapes and signatures alone, on the meta device: values need CUDA."""
    segments = row_segments(SHAPES[shape])
    size = int(segments[-1, 1]) + 3
    inputs = [torch.randn(size, h, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2)]
    output = find_backend("flash")(*inputs, attention_pattern(segments), 0.4)
    output.backward(torch.empty_like(output))
    assert [tensor.grad.shape for tensor in inputs] == [tensor.shape for tensor in inputs]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_backends_equal_the_cpu(backend, shape):
    torch.manual_seed(0)
    segments = row_segments(SHAPES[shape])
    size, scale = int(segments[-1, 1]) + 3, 0.2
    pattern = attention_pattern(segments)
    inputs = [torch.randn(size, heads, 64).bfloat16() for heads in (4, 2, 2)]
    grad = torch.randn(size, 4, 64).bfloat16()
    values = []
    for name, device, dtype in (("cpu", "cpu", torch.float32), (backend, "cuda", torch.bfloat16)):
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in inputs]
        output = find_backend(name)(*tensors, pattern, scale)
        output.backward(grad.to(device, dtype))
        values.append([output.detach(), *(tensor.grad for tensor in tensors)])
    for expected, actual in zip(*values):
        torch.testing.assert_close(actual.cpu().float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_the_configuration_alone_names_the_kernels():
    """On CUDA in 16 bits those of `model.attention`; elsewhere there is one choice."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0.0)
    attention = SegmentAttention(config, 1, AttnMaskType.causal, "self", backend="flex")

    def chosen(*, is_cuda: bool, element_size: int) -> str:
        return attention._backend_for(SimpleNamespace(is_cuda=is_cuda, element_size=lambda: element_size))

    assert chosen(is_cuda=True, element_size=2) == "flex" and chosen(is_cuda=False, element_size=2) == "cpu"
    attention.backend = "flash"
    assert chosen(is_cuda=True, element_size=2) == "flash" and chosen(is_cuda=True, element_size=4) == "flex"
    assert ModelConfig(tiny="llava").attention == "flash"


def test_overlapping_segments_are_refused():
    with pytest.raises(ValueError, match="must begin at 5"):
        attention_pattern(torch.tensor([[0, 5, 0, 0], [4, 8, 0, 5]]))
    with pytest.raises(ValueError, match="its prefix must lie before it"):
        attention_pattern(torch.tensor([[0, 5, 0, 0], [5, 8, 0, 6]]))


def test_work_is_that_of_the_pattern():
    """A prefix of 576 and eight captions of 175: pairs counted by the pattern are those of the dense mask, no more."""
    segments = row_segments([(576, [175] * 8)])
    assert attention_pattern(segments).pairs() == dense_mask(segments, 576 + 8 * 175).sum()
