"""Floating-point work of a policy, by its parts; a multiply-add is two."""

import math

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.tensors import vision_shapes
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
    config = architecture.vision.vision_config
    shapes = vision_shapes(architecture)
    if architecture.family == "llava":
        depth = architecture.vision.vision_feature_layer % (config.num_hidden_layers + 1)
        patches, full_layers, window = image_tokens + 1, depth, 0
    else:
        patches, full_layers = image_tokens * config.spatial_merge_size**2, len(config.fullatt_block_indexes)
        depth, window = config.depth, (config.window_size // config.patch_size) ** 2
    flops = 0.0
    for name, shape in shapes.items():
        if len(shape) < 2 or "position_embedding" in name:
            continue
        if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= depth:
            continue  # LLaVA reads an earlier layer; what follows is never run
        merged = "merger" in name or "projector" in name
        flops += 2 * math.prod(shape) * (image_tokens if merged else patches)
    pairs = full_layers * patches**2 + (depth - full_layers) * patches * window
    return flops + 4 * config.hidden_size * pairs
