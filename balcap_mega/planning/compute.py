"""Seconds that a tensor-parallel rank spends on rows: GEMMs, attention, elementwise work, and what collectives expose.

Megatron-Core hides the backward pass's reductions behind weight gradients. The forward pass's are exposed, and under
sequence parallelism so is the gather of each row-parallel layer's gradient; `hides_tensor` stands for Transformer
Engine's user buffers, which overlap these too and which this framework does not use.
"""

from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import attention_forward, head_weights, layer_weights, vision_forward
from balcap_mega.planning.hardware import BF16, Cluster
from balcap_mega.planning.workload import Work

ELEMENTWISE_BACKWARD = 2
"""The backward pass reads what the forward pass read, and the gradient beside it."""

ROPE_PASSES = 12
"""Times that Megatron's unfused rotary embedding reads or writes queries and keys: two products, a negated half and its
concatenation, a sum, and a last concatenation with nothing."""


@dataclass(frozen=True)
class Compute:
    """Seconds of one of the `tensor` ranks that share every layer, for a given `Work`.

    logit_bytes: moved for each logit of an update; those of a forward pass alone are half as many
    """

    architecture: Architecture
    cluster: Cluster
    tensor: int
    sequence: bool
    recompute: str = "none"
    fp8: bool = False
    image_tokens: int = 0
    hides_tensor: bool = False
    fused_rope: bool = True
    logit_bytes: int = 4 * BF16

    def layer_forward(self, work: Work) -> float:
        return self._gemms(work) + self._attention(work) + self._elementwise(work) + self._exposed(work, 4)

    def layer_backward(self, work: Work) -> float:
        """Seconds of one layer, with its recomputation."""
        again = {"none": 0.0, "selective": self._attention(work), "full": self.layer_forward(work)}[self.recompute]
        backward = 2 * self._gemms(work) + 2.5 * self._attention(work)
        backward += ELEMENTWISE_BACKWARD * self._elementwise(work)
        return again + backward + self._exposed(work, 2 if self.sequence else 0)

    def head(self, work: Work, gemms: int) -> float:
        """The LM head over the response tokens: one GEMM for logprobs alone, three with both gradients."""
        architecture, efficiency = self.architecture, self.cluster.efficiency
        flops = 2 * gemms * work.responses * head_weights(architecture) / self.tensor
        # A logit is written, read for statistics, and read and written for its gradient.
        logit = self.logit_bytes * (1 if gemms > 1 else 0.5)
        logits = logit * work.responses * architecture.vocab_size / self.tensor
        return flops / (self.cluster.gpu.matmul * efficiency.gemm) + self.moved(logits) + self._exposed(work, 2)

    def embedding(self, work: Work) -> float:
        """Seconds of the embedding lookup, and of filling in the images' embeddings."""
        return self.moved(3 * BF16 * work.tokens * self.architecture.hidden_size) + self._exposed(work, 2)

    def vision(self, images: float) -> float:
        """Seconds of the frozen tower's forward pass over the images of one tensor-parallel rank (`Rows.encoded`)."""
        flops = images * vision_forward(self.architecture, self.image_tokens)
        return flops / (self.cluster.gpu.matmul * self.cluster.efficiency.gemm)

    def moved(self, size: float) -> float:
        """Seconds of elementwise work that reads and writes `size` bytes in all."""
        return size / (self.cluster.gpu.memory_bandwidth * self.cluster.efficiency.elementwise)

    def _gemms(self, work: Work) -> float:
        """Of a layer's forward pass. Operands and results move before and after the tiles multiply: their time adds up,
        which is what makes narrow models, and layers cut into many parts, slower than their FLOPs say."""
        gpu, efficiency, a = self.cluster.gpu, self.cluster.efficiency, self.architecture
        rate = gpu.fp8_matmul * efficiency.fp8_gemm if self.fp8 else gpu.matmul * efficiency.gemm
        weights = layer_weights(a) / self.tensor
        heads = 2 * (a.num_attention_heads + a.num_kv_heads) * a.head_dim / self.tensor
        moved = work.tokens * (4 * a.hidden_size + heads + 3 * a.ffn_hidden_size / self.tensor) + work.rows * weights
        return 2 * work.tokens * weights / rate + BF16 * moved / gpu.memory_bandwidth

    def _attention(self, work: Work) -> float:
        return attention_forward(self.architecture, work.pairs) / self.tensor / self.cluster.gpu.attention

    def _elementwise(self, work: Work) -> float:
        """Bytes of a layer's forward pass: two norms and two residual additions (10·h), rotary embeddings, SwiGLU."""
        a = self.architecture
        stream = 10 * a.hidden_size / (self.tensor if self.sequence else 1)
        heads = (a.num_attention_heads + a.num_kv_heads) * a.head_dim / self.tensor
        heads *= 2 if self.fused_rope else ROPE_PASSES
        return self.moved(BF16 * work.tokens * (stream + heads + 3 * a.ffn_hidden_size / self.tensor))

    def _exposed(self, work: Work, units: int) -> float:
        """Seconds of collectives on the hidden states. units: a gather or a scatter counts 1, an all-reduce 2."""
        if self.tensor == 1 or self.hides_tensor:
            return 0.0
        share = BF16 * work.tokens * self.architecture.hidden_size * (self.tensor - 1) / self.tensor
        return units * share / self.cluster.bandwidth(self.tensor)
