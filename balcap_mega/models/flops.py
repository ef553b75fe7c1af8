"""Floating-point work of a policy, counted once for the planner, the benchmarks and every step's metrics.

A multiply-add is two. What counts is what the algorithm asks for: matrix products of the decoder, attention inside the
pattern, the LM head on response tokens, the vision tower. Each prompt and its image count once for all captions of
their group, and nothing that is recomputed, padded or scored for a reference counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture


@dataclass(frozen=True)
class TokenWork:
    """What the decoder computes.

    tokens:    that it reads
    pairs:     query-key pairs of attention
    responses: tokens that the LM head predicts
    """

    tokens: float = 0
    pairs: float = 0
    responses: float = 0

    def __add__(self, other: "TokenWork") -> "TokenWork":
        return TokenWork(self.tokens + other.tokens, self.pairs + other.pairs, self.responses + other.responses)


def group_work(prefix: int, captions: Sequence[int]) -> TokenWork:
    """Of a prefix of so many tokens and of its captions' responses, which see it and themselves.

    A caption's last token is predicted, but predicts nothing: it is not read.
    """
    read = [max(length - 1, 0) for length in captions]
    seen = prefix * (prefix + 1) // 2 + sum(length * prefix + length * (length + 1) // 2 for length in read)
    return TokenWork(prefix + sum(read), seen, sum(captions))


def layer_weights(architecture: Architecture) -> int:
    """Elements of a decoder layer's matrices, each of which multiplies every token."""
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    attention = architecture.hidden_size * (2 * queries + 2 * keys)
    return attention + 3 * architecture.hidden_size * architecture.ffn_hidden_size


def head_weights(architecture: Architecture) -> int:
    return architecture.hidden_size * architecture.vocab_size


def language_parameters(architecture: Architecture) -> int:
    """What a decoding step multiplies by: all layers and the head."""
    return architecture.num_layers * layer_weights(architecture) + head_weights(architecture)


FLASH_PASSES = 3.5
"""Flash attention's forward and backward pass, in forward passes."""


def attention_forward(architecture: Architecture, pairs: float) -> float:
    """Of one layer: scores and their weighted sum, 4·d a head and pair. Flash attention's backward pass costs 2.5 times
    that, of which 2 are no recomputation."""
    return 4 * architecture.num_attention_heads * architecture.head_dim * pairs


def language_forward(architecture: Architecture, work: TokenWork) -> float:
    """Of the decoder and the LM head."""
    layers = work.tokens * layer_weights(architecture) * 2 + attention_forward(architecture, work.pairs)
    return architecture.num_layers * layers + 2 * work.responses * head_weights(architecture)


def vision_forward(architecture: Architecture, image_tokens: int) -> float:
    """Of the vision tower and what projects it, for one image of that many embeddings."""
    if not image_tokens:
        return 0.0
    return architecture.family.vision_flops(architecture.config, image_tokens)


def update_flops(architecture: Architecture, work: TokenWork, vision: float, *, trains_vision: bool = False) -> float:
    """Of one update: its forward pass, and twice that backward. vision: `vision_forward` of its images, which a frozen
    tower does forward only."""
    return 3 * language_forward(architecture, work) + (3 if trains_vision else 1) * vision


def generation_flops(architecture: Architecture, work: TokenWork, vision: float) -> float:
    """Of sampling the same captions: every prompt once, every token once."""
    return language_forward(architecture, work) + vision
