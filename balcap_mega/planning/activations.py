"""Bytes that the backward pass of one packed row needs, by what keeps them: Korthikanti et al. (2022,
arXiv:2205.05198), for grouped-query attention, SwiGLU and flash attention that keeps no scores."""

from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture
from balcap_mega.planning.hardware import BF16, FP32
from balcap_mega.planning.workload import Work


@dataclass(frozen=True)
class Activations:
    """Bytes on one tensor-parallel rank.

    transformer_engine: with its fused norms and SwiGLU, as on a GPU. PyTorch's compute norms in float32 and keep every
                        intermediate of SwiGLU.
    fused_rope:         its kernel, which keeps nothing but the angles that all layers share
    """

    architecture: Architecture
    tensor: int
    sequence: bool
    recompute: str = "none"
    transformer_engine: bool = True
    fused_rope: bool = False

    def layer(self, tokens: float) -> dict[str, float]:
        """Kept for one decoder layer from its forward to its backward pass."""
        stream = BF16 * tokens * self.architecture.hidden_size / self._sequence_ranks
        if self.recompute == "full":
            return {"input": stream}
        # Attention recomputed alone still keeps its inputs and its output: all it would have kept but its statistics.
        kept = self._layer(tokens)
        return {name: size for name, size in kept.items() if name != "statistics" or self.recompute == "none"}

    def _layer(self, tokens: float) -> dict[str, float]:
        a, tensor = self.architecture, self.tensor
        norm_tokens = tokens / self._sequence_ranks
        stream = BF16 * norm_tokens * a.hidden_size
        queries, keys = a.num_attention_heads * a.head_dim, a.num_kv_heads * a.head_dim
        # With fewer key heads than ranks, ranks gather the whole projection and take their part of it.
        projection_ranks = 1 if tensor > a.num_kv_heads else tensor
        key_width = keys / min(tensor, a.num_kv_heads)
        gated = a.ffn_hidden_size / tensor
        heads = tokens * (a.num_attention_heads / tensor + key_width / a.head_dim)
        # Of the norms of queries and keys: their input, in float32 and twice if it is not fused; and a number a head.
        head_norms = (BF16 * a.head_dim * (1 if self.transformer_engine else 4) + FP32) * heads
        return {
            # Of two norms: their input, in float32 and twice if PyTorch's; and their output.
            "norms": 2 * (stream if self.transformer_engine else 2 * 2 * stream) + 2 * stream,
            "norm statistics": 2 * FP32 * norm_tokens,
            "projection": BF16 * tokens * (queries + 2 * keys) / projection_ranks,  # a view of it is the values
            "queries and keys": BF16 * tokens * (queries / tensor + key_width),
            "query and key norms": head_norms if a.decoder.qk_norm else 0.0,
            # Cosine and sine, for queries and for keys.
            "rotary": 0.0 if self.fused_rope else 4 * BF16 * tokens * a.head_dim,
            "attention output": BF16 * tokens * queries / tensor,
            "statistics": FP32 * tokens * a.num_attention_heads / tensor,
            "gate and up": BF16 * tokens * 2 * gated,
            "mlp": BF16 * tokens * gated * (1 if self.transformer_engine else 3),
        }

    def working(self, tokens: float) -> float:
        """Temporaries of a layer's backward pass: gradients of the MLP's inner tensors, the gathered input of a weight
        gradient, and two gradients of the residual stream; with full recomputation also the layer's activations."""
        a = self.architecture
        again = sum(self._layer(tokens).values()) if self.recompute == "full" else 0.0
        return again + BF16 * tokens * (3 * a.ffn_hidden_size / self.tensor + 3 * a.hidden_size)

    def head(self, work: Work, chunk_bytes: float) -> float:
        """Temporaries of the LM head on the last stage: gathered and normalised hidden states, the rows that predict a
        response and their gradient, a chunk of logits, and the placeholder for the weight's gradient."""
        a = self.architecture
        shard = BF16 * a.hidden_size * a.vocab_size / self.tensor
        chunk = min(chunk_bytes, BF16 * work.responses * a.vocab_size / self.tensor)
        return BF16 * a.hidden_size * (2 * work.tokens + 3 * work.responses) + chunk + shard

    @property
    def _sequence_ranks(self) -> int:
        return self.tensor if self.sequence else 1
