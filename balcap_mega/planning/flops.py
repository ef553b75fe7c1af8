"""Floating-point work of a policy, by its parts; a multiply-add is two."""

from balcap_mega.models.architecture import Architecture
from balcap_mega.planning.workload import Work


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


def attention_forward(architecture: Architecture, pairs: float) -> float:
    """Of one layer: scores and their weighted sum, 4·d a head and pair. The backward pass costs 2.5 times that."""
    return 4 * architecture.num_attention_heads * architecture.head_dim * pairs


def model_flops(architecture: Architecture, work: Work) -> float:
    """Of one update of `work`: forward and backward, nothing computed twice, attention inside the pattern only."""
    dense = 6 * (
        work.tokens * architecture.num_layers * layer_weights(architecture)
        + work.responses * head_weights(architecture)
    )
    return dense + 3 * architecture.num_layers * attention_forward(architecture, work.pairs)


def vision_forward(architecture: Architecture, image_tokens: int) -> float:
    """Of the vision tower and what projects it, for one image of that many embeddings."""
    if not image_tokens:
        return 0.0
    return architecture.family.vision_flops(architecture.config, image_tokens)
