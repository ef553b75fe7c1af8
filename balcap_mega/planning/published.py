"""What others measured on H100s and published, and the planner's prediction of the same: how far it can be trusted.

`Efficiency` was fitted to the rows marked so; the others were only ever compared.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from balcap_mega.models.architecture import Architecture
from balcap_mega.planning.compute import Compute
from balcap_mega.planning.flops import attention_forward, head_weights, layer_weights
from balcap_mega.planning.generation import Generation, cache_bytes_per_token
from balcap_mega.planning.hardware import CUDNN_ATTENTION, GIB, H100, Cluster, Efficiency
from balcap_mega.planning.update import Passes
from balcap_mega.planning.workload import Rows, Work, Workload, pack

MEGATRON = "Megatron-LM README, table of weak scaling (July 2024)"
BRIDGE = "Megatron-Bridge performance summary, 25.11, DGX-H100"
NEMO_RL = "NeMo-RL performance summary, DGX-H100"
NEMO_RL_BLOG = "NeMo-RL blog of v0.3, repeated in NeMo-RL issue 959"


@dataclass(frozen=True)
class Published:
    """One number: `value` in `unit`; `predict` computes it anew."""

    source: str
    name: str
    value: float
    unit: str
    predict: Callable[[Efficiency], float]
    fitted: bool = False

    def error(self, efficiency: Efficiency = Efficiency()) -> float:
        """The prediction over the published value, less one."""
        return self.predict(efficiency) / self.value - 1


def text_model(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> Architecture:
    """A language model without a vision tower. A GPT's two-matrix MLP of width 4·h is a gated one of width 8·h/3: the
    same parameters, FLOPs and bytes."""
    return Architecture(
        family="qwen2_5_vl",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        mrope_section=(64, 0, 0),
        qkv_bias=False,
        tie_word_embeddings=False,
        image_token_id=0,
        vision=None,
    )


LLAMA_8B = text_model(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = text_model(80, 8192, 28672, 64, 8, 128256)
QWEN3_32B = text_model(64, 5120, 25600, 64, 8, 151936)


def _cluster(gpus: int, efficiency: Efficiency) -> Cluster:
    gpu = replace(H100, attention=CUDNN_ATTENTION)  # Transformer Engine's attention
    return Cluster(nodes=-(-gpus // 8), gpu=gpu, efficiency=efficiency)


def _reported_flops(model: Architecture, sequences: int, length: int) -> float:
    """Model FLOPs as Megatron-LM counts them: attention over all pairs, causal or not."""
    dense = model.num_layers * layer_weights(model) + head_weights(model)
    attention = 3 * model.num_layers * attention_forward(model, length**2)
    return sequences * (6 * length * dense + attention)


def _passes(model: Architecture, cluster: Cluster, tensor: int, pipeline: int, data: int, **options) -> Passes:
    """Data-parallel reductions hidden, weight gradients fused, as NVIDIA's recipes have it."""
    compute_options = {name: options.pop(name) for name in ("recompute", "fp8", "hides_tensor", "logit_bytes") if name in options}
    compute = Compute(model, cluster, tensor, sequence=tensor > 1, **compute_options)
    layers = tuple(model.num_layers // pipeline for _ in range(pipeline))
    parameters = (sum(layers) * layer_weights(model) / pipeline + head_weights(model)) / tensor
    return Passes(compute, layers, data, parameters, fused_gradients=True, hides_data=True, **options)


def pretraining(model: Architecture, tensor: int, pipeline: int, data: int, sequences: int, length: int, **options):
    """Predicts TFLOP/s a GPU of a pretraining step, one sequence a microbatch."""

    def predict(efficiency: Efficiency) -> float:
        gpus = tensor * pipeline * data
        passes = _passes(model, _cluster(gpus, efficiency), tensor, pipeline, data, **options)
        row = Work(tokens=length, pairs=length * (length + 1) / 2, responses=length, images=0)
        count = sequences // data
        seconds = sum(passes.update(Rows(count, row * count, row)).values())
        return _reported_flops(model, sequences, length) / seconds / gpus / 1e12

    return predict


@dataclass(frozen=True)
class RlRun:
    """A GRPO step of NeMo-RL: 64 prompts of 32 responses, rows of 4,096 tokens, four updates, old and reference
    logprobs in two passes each over everything."""

    model: Architecture
    gpus: int
    response: float
    prompt: int
    tensor: int
    pipeline: int
    engine_tensor: int
    recompute: str = "none"
    fp8: bool = False
    apart: bool = False  # one step off policy: half of the GPUs generate while the other half trains
    overhead: float = 0.0

    def phases(self, efficiency: Efficiency) -> dict[str, float]:
        gpus = self.gpus // 2 if self.apart else self.gpus
        cluster = _cluster(gpus, efficiency)
        workload = Workload(
            prompts=64, group=32, image_tokens=0, prefix_tokens=self.prompt, caption_tokens=self.response,
            max_tokens=4096 - self.prompt, updates=4, forward_passes=2, shared_prefix=False,
        )  # fmt: skip
        data = gpus // (self.tensor * self.pipeline)
        passes = _passes(
            self.model, cluster, self.tensor, self.pipeline, data, recompute=self.recompute, fp8=self.fp8,
            speed=efficiency.rows, logit_bytes=50,
        )
        rows = pack(workload, (4096, self.tensor, data, self.model.hidden_size))
        weight_bytes = 1 if self.fp8 else 2
        fraction = 0.8 if self.apart else 0.6
        free = fraction * H100.memory - weight_bytes * _elements(self.model) / self.engine_tensor - 5 * GIB
        cache = free / cache_bytes_per_token(self.model, self.engine_tensor)
        engine = Generation(self.model, cluster, self.engine_tensor, weight_bytes, cache, at_once=1024)
        return {
            "generation": engine.seconds(workload, gpus // self.engine_tensor),
            "logprobs": workload.updates * workload.forward_passes * passes.forward(rows),
            "training": workload.updates * sum(passes.update(rows).values()),
        }

    def seconds(self, efficiency: Efficiency) -> float:
        phases = self.phases(efficiency)
        if self.apart:
            return max(phases["generation"], phases["logprobs"] + phases["training"])
        return sum(phases.values())

    def tokens_per_gpu(self, efficiency: Efficiency) -> float:
        return 2048 * (self.prompt + self.response) / self.seconds(efficiency) / self.gpus


def _elements(model: Architecture) -> float:
    return model.num_layers * layer_weights(model) + 2 * head_weights(model)
