"""Time the attention backends on the shared-prefix pattern, forward and backward.

    python benchmarks/attention.py [--json FILE] [--prefixes 64 576 1280] [--groups 1 4 8 16] [--caption 175]

On a CPU `cpu` meets three plainer ways: SDPA a segment at a time with a mask over prefix and segment, one SDPA with the
dense mask of the whole row, and SDPA of the unshared batch. On CUDA `flash` meets `flex`, at Qwen2.5-VL-7B's heads; the
last lines are each one's total, by which to set `model.attention`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from balcap_mega.models.attention_backends import find_backend
from balcap_mega.models.attention_backends.pattern import AttentionPattern, attention_pattern

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def segments_of(prefix: int, captions: list[int]) -> Tensor:
    rows, at = [(0, prefix, 0, 0)], prefix
    for caption in captions:
        rows.append((at, at := at + caption, 0, prefix))
    return torch.tensor(rows, dtype=torch.int32)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
    heads_first = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads_first, enable_gqa=True, **kwargs)[0].transpose(0, 1)


def segment_by_segment(segments: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    outputs = []
    for start, stop, first, last in segments.tolist():
        own = slice(start, stop)
        if first == last:
            outputs.append(_sdpa(query[own], key[own], value[own], is_causal=True))
            continue
        mask = torch.ones(stop - start, last - first + stop - start, dtype=torch.bool).tril(last - first)
        keys, values = (torch.cat([tensor[first:last], tensor[own]]) for tensor in (key, value))
        outputs.append(_sdpa(query[own], keys, values, attn_mask=mask))
    return torch.cat(outputs)


def dense(segments: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = torch.zeros(len(query), len(query), dtype=torch.bool)
    for start, stop, first, last in segments.tolist():
        mask[start:stop, first:last] = True
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
    return _sdpa(query, key, value, attn_mask=mask)


def unshared(segments: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    outputs = []
    for start, stop, first, last in segments.tolist()[1:]:
        whole = (torch.cat([tensor[first:last], tensor[start:stop]]) for tensor in (query, key, value))
        outputs.append(_sdpa(*whole, is_causal=True)[last - first :])
    return torch.cat(outputs)


def milliseconds(attention: Attention, inputs: list[Tensor], repeats: int) -> float:
    """Median of `repeats` forward-and-backward passes, after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        output = attention(*inputs)
        output.backward(torch.ones_like(output))
        if output.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    once()
    return sorted(once() for _ in range(repeats))[repeats // 2]


def contenders(cuda: bool, segments: Tensor, pattern: AttentionPattern, scale: float) -> dict[str, Attention]:
    backends = {
        name: partial(_call, find_backend(name), pattern, scale) for name in (["flash", "flex"] if cuda else ["cpu"])
    }
    plain = {} if cuda else {f.__name__: partial(f, segments) for f in (segment_by_segment, dense, unshared)}
    return backends | plain


def _call(backend, pattern: AttentionPattern, scale: float, *inputs: Tensor) -> Tensor:
    return backend(*inputs, pattern, scale)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 576, 1280])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--caption", type=int, default=175)
    parser.add_argument("--heads", type=int, default=28 if cuda else 4)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128 if cuda else 64)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    arguments = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

    results = []
    for prefix in arguments.prefixes:
        for group in arguments.groups:
            segments = segments_of(prefix, [arguments.caption] * group)
            pattern = attention_pattern(segments)
            heads = (arguments.heads, arguments.key_heads, arguments.key_heads)
            inputs = [
                torch.randn(pattern.total, h, arguments.head_dim, device=device, dtype=dtype, requires_grad=True)
                for h in heads
            ]
            flops = (
                3.5 * 4 * arguments.head_dim * arguments.heads * pattern.pairs()
            )  # backward: five GEMMs to forward's two
            for name, attention in contenders(cuda, segments, pattern, arguments.head_dim**-0.5).items():
                elapsed = milliseconds(attention, inputs, arguments.repeats)
                result = {"prefix": prefix, "group": group, "backend": name, "ms": round(elapsed, 3)}
                results.append(result | {"gflops_per_second": round(flops / elapsed / 1e6, 1)})
                print(" ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    if arguments.json:
        setting = vars(arguments) | {
            "json": None,
            "device": device,
            "dtype": str(dtype),
            "torch": torch.__version__,
        }
        arguments.json.write_text(
            json.dumps({"command": sys.argv, "setting": setting, "results": results}, indent=1) + "\n"
        )
    for backend in ("flash", "flex") if cuda else ():
        print(f"{backend}: {sum(result['ms'] for result in results if result['backend'] == backend):.1f} ms in all")


if __name__ == "__main__":
    main()
