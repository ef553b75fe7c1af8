"""Seconds of a step's rollouts in one engine: prompts once, then decoding steps until the last caption ends."""

from dataclasses import dataclass

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import attention_forward, language_parameters, layer_weights, vision_forward
from balcap_mega.planning.hardware import BF16, Cluster
from balcap_mega.planning.workload import Workload

AT_ONCE = 1024
"""`max_num_seqs` of vLLM 0.32 for offline engines on a GPU of 70 GiB and more, at which `rollout.engine` leaves it."""

ALL_REDUCE_SECONDS = 12e-6
"""Latency of vLLM's own all-reduce of a decoding step's few kilobytes over NVLink; two a layer."""


@dataclass(frozen=True)
class Generation:
    """One engine of `tensor` ranks.

    weight_bytes: of one element of the decoder's matrices: 2, or 1 in FP8
    cache_tokens: tokens whose keys and values fit its cache
    """

    architecture: Architecture
    cluster: Cluster
    tensor: int
    weight_bytes: int
    cache_tokens: float

    def seconds(self, workload: Workload, engines: int) -> float:
        """Seconds to sample the captions of this engine's share of the step's prompts."""
        prompts = -(-workload.prompts // engines)
        return self.prefill(workload, prompts) + self.decode(workload, prompts * workload.group)

    def prefill(self, workload: Workload, prompts: float) -> float:
        """Seconds to compute every image and prompt once: a group's captions share them through the prefix cache."""
        prefix = workload.prefix_tokens
        dense = 2 * prefix * self.architecture.num_layers * layer_weights(self.architecture)
        attention = self.architecture.num_layers * attention_forward(self.architecture, prefix**2 / 2)
        vision = vision_forward(self.architecture, workload.image_tokens)
        rate = self.cluster.gpu.matmul * self.cluster.efficiency.gemm
        return prompts * ((dense + vision) / rate + attention / self.cluster.gpu.attention) / self.tensor

    def decode(self, workload: Workload, captions: int) -> float:
        """Seconds to decode all responses, as many at once as the cache holds; the batch shrinks as captions end."""
        prefix, mean = workload.prefix_tokens, workload.caption_tokens
        at_once = max(min(captions, AT_ONCE, int(self._concurrent(workload))), 1)
        # While captions wait their turn the batch stays full, of captions at every stage of their length.
        steps = (captions - at_once) / at_once * mean
        seconds = steps * self.step_seconds(at_once, prefix + mean / 2)
        done, left = 0, at_once
        for length in workload.lengths(at_once):
            if length > done:
                seconds += (length - done) * self.step_seconds(left, prefix + (done + length) / 2)
                done = length
            left -= 1
        return seconds

    def _concurrent(self, workload: Workload) -> float:
        """How many captions' keys and values fit the cache at once; a group's prefix takes room once."""
        per_caption = workload.caption_tokens + workload.prefix_tokens / workload.group
        return self.cache_tokens / per_caption

    def step_seconds(self, batch: float, context: float) -> float:
        """Seconds of one decoding step: a token for each of `batch` captions of `context` tokens."""
        architecture, gpu, efficiency = self.architecture, self.cluster.gpu, self.cluster.efficiency
        parameters = language_parameters(architecture) / self.tensor
        bandwidth = gpu.memory_bandwidth * efficiency.decode
        matmul = gpu.matmul * efficiency.gemm
        if self.weight_bytes == 1:
            matmul = gpu.fp8_matmul * efficiency.fp8_gemm
        weights = max(parameters * self.weight_bytes / bandwidth, 2 * parameters * batch / matmul)
        cache = batch * context * cache_bytes_per_token(architecture, self.tensor) / bandwidth
        reductions = 2 * architecture.num_layers * ALL_REDUCE_SECONDS if self.tensor > 1 else 0.0
        return weights + cache + reductions + efficiency.engine_step


def cache_bytes_per_token(architecture: Architecture, tensor: int) -> float:
    """Bytes of one token's keys and values on one rank. Ranks share the key/value heads, each has at least one."""
    heads = max(architecture.num_kv_heads // tensor, 1)
    return 2 * BF16 * architecture.num_layers * heads * architecture.head_dim
