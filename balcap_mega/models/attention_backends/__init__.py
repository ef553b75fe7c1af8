"""Exact shared-prefix attention by several kernels: fused CPU, CUDA flash-attention, FlexAttention.

A backend is a function `(query [S, H, d], key [S, H_kv, d], value [S, H_kv, d], pattern, scale) -> [S, H, d]`,
differentiable in the first three. None repeats keys or values, neither over query heads nor over captions.
"""

from collections.abc import Callable

from torch import Tensor

from balcap_mega.models.attention_backends.pattern import AttentionPattern

Backend = Callable[[Tensor, Tensor, Tensor, AttentionPattern, float], Tensor]


def find_backend(name: str) -> Backend:
    """The backend called `name`: cpu, flash or flex."""
    if name == "cpu":
        from balcap_mega.models.attention_backends.cpu import attention
    elif name == "flash":
        from balcap_mega.models.attention_backends.flash import attention
    elif name == "flex":
        from balcap_mega.models.attention_backends.flex import attention
    else:
        raise ValueError(f"no attention backend is called {name!r}; there are cpu, flash and flex")
    return attention
