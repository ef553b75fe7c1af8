"""What others measured on H100s and published, and the planner's prediction of the same: how far it can be trusted.

`Efficiency` was fitted by hand to the rows marked so; the others were only compared. What sources leave open is assumed
alike for all of their rows: one sequence a microbatch and plain 1F1B in Megatron-LM's table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from balcap_mega.models.architecture import Architecture
from balcap_mega.models.families.interface import Decoder
from balcap_mega.models.flops import TokenWork, head_weights, layer_weights, update_flops
from balcap_mega.planning.compute import Compute
from balcap_mega.planning.generation import Generation, cache_bytes_per_token
from balcap_mega.planning.hardware import CUDNN_ATTENTION, GIB, H100, Cluster, Efficiency
from balcap_mega.planning.update import Passes
from balcap_mega.planning.workload import Rows, Work, Workload, pack

MEGATRON = "Megatron-LM README, July 2024, images/model_table.png"
BRIDGE = "Megatron-Bridge performance summary, 25.11, DGX-H100"
NEMO_RL = "NeMo-RL performance summary, DGX-H100"
NEMO_RL_PHASES = "NeMo-RL v0.3 blog, as quoted in NeMo-RL issue 959"

UNFUSED_LOGIT_BYTES = 50
"""Moved for each logit by Megatron's cross-entropy on float32 logits, forward and backward."""


@dataclass(frozen=True)
class Published:
    """One number: `value` in `unit`; `predict` computes it anew."""

    source: str
    name: str
    value: float
    unit: str
    predict: Callable[[Efficiency], float]
    fitted: bool = False

    def error(self) -> float:
        """The prediction over the published value, less one."""
        return self.predict(Efficiency()) / self.value - 1


def text_model(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> Architecture:
    """A language model without a vision tower. A GPT's two-matrix MLP of width 4·h is a gated one of width 8·h/3: the
    same parameters, FLOPs and bytes."""
    return Architecture(
        family=None,
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
        decoder=Decoder(rotary_axes=(0,) * 64),
        tie_word_embeddings=False,
        image_token_id=0,
        config=None,
    )


LLAMA_8B = text_model(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = text_model(80, 8192, 28672, 64, 8, 128256)
QWEN3_32B = text_model(64, 5120, 25600, 64, 8, 151936)


def _cluster(gpus: int, efficiency: Efficiency) -> Cluster:
    gpu = replace(H100, attention=CUDNN_ATTENTION)  # Transformer Engine's attention
    return Cluster(nodes=-(-gpus // 8), gpu=gpu, efficiency=efficiency)


def _reported_flops(model: Architecture, sequences: int, length: int) -> float:
    """Model FLOPs as Megatron-LM counts them: attention over all pairs, causal or not."""
    return sequences * update_flops(model, TokenWork(length, length**2, length), vision=0.0)


def _passes(model: Architecture, cluster: Cluster, tensor: int, pipeline: int, data: int, **options) -> Passes:
    """Data-parallel reductions hidden, weight gradients fused, as NVIDIA's recipes have it."""
    for_compute = {name: options.pop(name) for name in ("recompute", "fp8", "hides_tensor") if name in options}
    compute = Compute(model, cluster, tensor, sequence=tensor > 1, logit_bytes=UNFUSED_LOGIT_BYTES, **for_compute)
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

    def phases(self, efficiency: Efficiency) -> dict[str, float]:
        gpus = self.gpus // 2 if self.apart else self.gpus
        cluster = _cluster(gpus, efficiency)
        workload = Workload(
            prompts=64, group=32, image_tokens=0, prefix_tokens=self.prompt, caption_tokens=self.response,
            max_tokens=4096 - self.prompt, updates=4, forward_passes=2, shared_prefix=False,
        )  # fmt: skip
        data = gpus // (self.tensor * self.pipeline)
        passes = _passes(
            self.model,
            cluster,
            self.tensor,
            self.pipeline,
            data,
            recompute=self.recompute,
            fp8=self.fp8,
            speed=efficiency.rows,
        )
        rows = pack(workload, (4096, self.tensor, data, self.model.hidden_size))
        weight_bytes = 1 if self.fp8 else 2
        fraction = 0.8 if self.apart else 0.6
        free = fraction * H100.memory - weight_bytes * _elements(self.model) / self.engine_tensor - 5 * GIB
        cache = free / cache_bytes_per_token(self.model, self.engine_tensor)
        engine = Generation(self.model, cluster, self.engine_tensor, weight_bytes, cache)
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


def _megatron(heads: int, hidden: int, layers: int, tensor: int, pipeline: int, batch: int, value: float, fitted=False):
    model = text_model(layers, hidden, round(8 * hidden / 3), heads, heads, 131072)
    predict = pretraining(model, tensor, pipeline, 48, batch, 4096, hides_tensor=True)
    return Published(
        MEGATRON, f"{layers} layers x {hidden}, TP{tensor} PP{pipeline} DP48", value, TFLOPS, predict, fitted
    )


def _bridge(name: str, model: Architecture, tensor, pipeline, data, batch, chunks, value: float, fitted=False):
    predict = pretraining(model, tensor, pipeline, data, batch, 8192, fp8=True, hides_tensor=True, chunks=chunks)
    return Published(BRIDGE, f"{name}, FP8, TP{tensor} PP{pipeline} DP{data}", value, TFLOPS, predict, fitted)


def _whole_step(name: str, run: RlRun, value: float) -> Published:
    return Published(NEMO_RL, f"{name}, {run.gpus} GPUs", value, "tokens/s/GPU", run.tokens_per_gpu)


def _phase(name: str, run: RlRun, phase: str, value: float, fitted=False) -> Published:
    def predict(efficiency: Efficiency) -> float:
        return run.phases(efficiency)[phase]

    return Published(NEMO_RL_PHASES, f"{name}, {run.gpus} GPUs: {phase}", value, "s", predict, fitted)


TFLOPS = "TFLOP/s/GPU"
# Prompt lengths follow from each row's tokens a second, step time and mean response.
_BLOG_8B = RlRun(LLAMA_8B, gpus=8, response=795, prompt=127, tensor=1, pipeline=1, engine_tensor=1)
_BLOG_70B = RlRun(LLAMA_70B, gpus=64, response=398, prompt=127, tensor=4, pipeline=4, engine_tensor=4)
_RL_8B = RlRun(LLAMA_8B, 16, 1019, 127, tensor=1, pipeline=2, engine_tensor=1, recompute="full")
_RL_8B_APART = replace(_RL_8B, response=1123, pipeline=1, apart=True)
_RL_32B = RlRun(QWEN3_32B, 32, 3251, 103, tensor=4, pipeline=4, engine_tensor=4)

ROWS = (
    _megatron(16, 2048, 24, 1, 1, 192, 408.8),
    _megatron(32, 4096, 30, 2, 1, 192, 465.9),
    _megatron(48, 6144, 32, 4, 1, 192, 489.1, fitted=True),
    _megatron(56, 7168, 48, 8, 1, 192, 459.6),
    _megatron(64, 8192, 84, 8, 2, 384, 419.7),
    _megatron(80, 10240, 92, 8, 4, 768, 420.5),
    _megatron(96, 12288, 96, 8, 6, 1152, 432.8, fitted=True),
    _megatron(128, 16384, 96, 8, 8, 1536, 474.4),
    _megatron(144, 18432, 112, 8, 16, 3072, 459.9),
    _bridge("Llama 3 8B", LLAMA_8B, 1, 1, 8, 128, 1, 744, fitted=True),
    _bridge("Llama 3 70B", LLAMA_70B, 4, 8, 2, 128, 5, 719),
    _phase("Llama 3.1 8B", _BLOG_8B, "generation", 58, fitted=True),
    _phase("Llama 3.1 8B", _BLOG_8B, "logprobs", 18, fitted=True),
    _phase("Llama 3.1 8B", _BLOG_8B, "training", 28, fitted=True),
    _phase("Llama 3.1 70B", _BLOG_70B, "generation", 84, fitted=True),
    _phase("Llama 3.1 70B", _BLOG_70B, "logprobs", 18),
    _phase("Llama 3.1 70B", _BLOG_70B, "training", 28),
    _whole_step("Llama 3.1 8B, v0.5", _RL_8B, 1581),
    _whole_step("Llama 3.1 8B, v0.4", replace(_RL_8B, response=1060, prompt=132), 1562),
    _whole_step("Llama 3.1 8B one step off policy, v0.5", _RL_8B_APART, 2478),
    _whole_step("Llama 3.1 8B one step off policy, FP8, v0.5", replace(_RL_8B_APART, response=1128, fp8=True), 3052),
    _whole_step("Llama 3.1 8B one step off policy, v0.4", replace(_RL_8B_APART, response=1129, pipeline=2), 2161),
    _whole_step("Qwen3 32B, v0.5", _RL_32B, 571),
    _whole_step("Qwen3 32B, v0.4", replace(_RL_32B, response=3206), 540),
    _whole_step("Qwen3 32B one step off policy, v0.5", replace(_RL_32B, gpus=64, response=3252, apart=True), 538),
    _whole_step("Qwen3 32B one step off policy, v0.4", replace(_RL_32B, gpus=64, response=3207, apart=True), 494),
)
"""Every dense row on H100s of these tables, but for Llama 3.1 405B: the planner knows no context parallelism."""
