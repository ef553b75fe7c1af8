"""Bytes on the most loaded rank of each pipeline stage, by part, at each moment of a step that could be the fullest.

Engine and learner take turns unless `parallel.offload` is never: the engine sleeps while the learner trains, gradients
and the optimizer's state leave the device while the engine generates, and the key/value cache while weights move.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from balcap_mega.algorithm.logits import CHUNK_BYTES
from balcap_mega.config.schema import RunConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.parallel.host_memory import BLOCK_BYTES
from balcap_mega.planning.activations import Activations
from balcap_mega.planning.generation import cache_bytes_per_token
from balcap_mega.planning.hardware import BF16, FP32, GIB, Gpu
from balcap_mega.planning.optimizer import OptimizerBytes
from balcap_mega.planning.parameters import ParameterCounts
from balcap_mega.planning.workload import Rows, Workload
from balcap_mega.rollout.refit.refit import BUCKET_BYTES

CHECKPOINT_BYTES = 3 * FP32
"""Bytes for each trained parameter: its float32 weight and two moments, in float32 whatever the optimizer keeps."""

CONTEXT = 2.0 * GIB
"""CUDA context, loaded kernels, NCCL's buffers and cuBLAS' workspaces, of learner and engine together. Assumed."""

ASLEEP = 1.0 * GIB
"""Bytes that a sleeping engine keeps: CUDA graphs and workspaces. Assumed."""

ENGINE_WORKSPACE = 4.0 * GIB
"""Bytes that an awake engine takes of its fraction for CUDA graphs, and for activations, images and logits of a prefill
of 8,192 tokens. Assumed."""

FRAGMENTATION = 0.05
"""Share lost to fragmentation of what the learner allocates beyond weights: Megatron-Bridge's pull request 5266 reports
75.3 GiB reserved for 72.1 GiB allocated."""


@dataclass(frozen=True)
class Moment:
    """One moment of a step on one pipeline stage: bytes by part."""

    name: str
    stage: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """moments:      every stage's, in the order of a step
    host:         bytes by part that the most loaded rank has in the host's memory, each at its largest
    swapped:      of those, what travels between device and host as engine and learner change places
    cache_tokens: tokens whose keys and values fit the engine's cache; below 0 where not even its weights fit
    """

    moments: tuple[Moment, ...]
    host: dict[str, float]
    swapped: float
    cache_tokens: float

    @property
    def fullest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def peak(self, name: str) -> Moment:
        """The fullest stage at that moment."""
        return max((moment for moment in self.moments if moment.name == name), key=lambda moment: moment.total)


def predict_memory(
    config: RunConfig, architecture: Architecture, counts: ParameterCounts, workload: Workload, rows: Rows, gpu: Gpu
) -> Memory:
    """Memory of a run whose data-parallel ranks train on `rows`."""
    parallel = config.parallel
    engine_weights = engine_weight_bytes(config, architecture, counts)
    awake = config.rollout.memory_fraction * gpu.memory
    turns = parallel.offload != "never"
    sizes = counts.engine_parameters(config.rollout.tensor_parallel)
    asleep = pinned_bytes([engine_weights * size / sum(sizes) for size in sizes])
    a_parameter = OptimizerBytes.of(config.optimizer)
    moments, hosts, swapped = [], [], 0.0
    for stage, parameters in enumerate(counts.stages(parallel.tensor, parallel.pipeline)):
        base = {"weights": BF16 * parameters.total, "context": CONTEXT}
        trained = parameters.language + (0 if config.model.freeze_vision else parameters.vision)
        shards = rows.data_size if parallel.distributed_optimizer else 1
        state = {"gradients": a_parameter.gradient * trained, "optimizer": a_parameter.kept * trained / shards}
        training = base | state | _backward(config, architecture, workload, rows, stage, parameters.layers)
        moving = base | {"buckets": 2 * BUCKET_BYTES}
        if turns:
            parts = {
                "rollout": base | {"engine": awake},
                "update": training | {"asleep": ASLEEP},
                "refit": moving | {"engine": engine_weights, "asleep": ASLEEP},
            }
        else:
            always = {"engine": awake}
            parts = {"rollout": base | state | always, "update": training | always, "refit": moving | state | always}
        moments += [Moment(name, stage, held) for name, held in parts.items()]
        if a_parameter.scratch:  # by then what the backward pass needed is free
            stepping = base | state | {"scratch": a_parameter.scratch * trained / shards}
            moments.append(Moment("update", stage, stepping | ({"asleep": ASLEEP} if turns else {"engine": awake})))
        held = {"checkpoint": checkpoint_bytes(parameters.total, trained, rows.data_size)}
        if config.algorithm.kl_weight > 0:
            held["reference"] = in_blocks(BF16 * trained)
        if turns:
            held |= {"optimizer": in_blocks(state["optimizer"]), "engine": asleep}
            swapped = max(swapped, state["optimizer"] + engine_weights)
        hosts.append(held)
    room = awake - engine_weights - ENGINE_WORKSPACE
    return Memory(
        tuple(moments),
        host=max(hosts, key=lambda parts: sum(parts.values())),
        swapped=swapped,
        cache_tokens=room / cache_bytes_per_token(architecture, config.rollout.tensor_parallel),
    )


def checkpoint_bytes(parameters: float, trained: float, data_size: int) -> float:
    """What a data-parallel rank holds of a checkpoint on its way to the disk: its share of weights and optimizer."""
    return (BF16 * parameters + CHECKPOINT_BYTES * trained) / data_size


def _backward(
    config: RunConfig, architecture: Architecture, workload: Workload, rows: Rows, stage: int, weights: int
) -> dict[str, float]:
    """Bytes of activations under 1F1B, beyond a stage's `weights`, gradients and optimizer. The earlier a stage, the
    more rows have had their forward pass there, but not their backward pass."""
    parallel = config.parallel
    activations = Activations(
        architecture,
        parallel.tensor,
        parallel.sequence,
        config.model.recompute,
        fused_rope=config.model.apply_rope_fusion,
    )
    layers = architecture.layers_per_stage(parallel.pipeline)[stage]
    in_flight = min(parallel.pipeline - stage, rows.count)
    parts = {
        "activations": in_flight * layers * sum(activations.layer(rows.largest.tokens).values()),
        "working": activations.working(rows.largest.tokens),
    }
    if config.model.fp8 != "none":  # each weight and its transpose, a byte each, from a row's forward to its backward
        parts["FP8 weights"] = 2 * weights * (1 / layers if config.model.recompute == "full" else in_flight)
    if stage == 0:  # kept for all of a step's passes
        images = workload.updates * rows.total.images
        width = architecture.hidden_size * (1 + architecture.decoder.deepstack)
        parts["image embeddings"] = BF16 * images * workload.image_tokens * width
    if stage == parallel.pipeline - 1:
        parts["head"] = activations.head(rows.largest, CHUNK_BYTES["cuda"])
        if config.optimizer.main_grads_dtype != "float32":  # the weight's gradient of a row, before it is rounded
            parts["head"] += FP32 * architecture.hidden_size * architecture.vocab_size / parallel.tensor
    return parts | {"fragmentation": FRAGMENTATION * sum(parts.values())}


def in_blocks(size: float) -> float:
    """Bytes of the blocks that `HostMemory` allocates for so many bytes."""
    return math.ceil(size / BLOCK_BYTES) * BLOCK_BYTES


def pinned_bytes(sizes: Sequence[float]) -> float:
    """Host memory of a sleeping engine's weights, given its parameters' sizes.

    PyTorch gives each of 10 MiB or more an allocation of its own, in steps of 2 MiB, and smaller ones share some of 20
    MiB. For a copy of each vLLM pins memory, which PyTorch rounds up to a power of two.
    """
    large = [math.ceil(size / 2**21) * 2**21 for size in sizes if size >= 10 * 2**20]
    small = sum(size for size in sizes if size < 10 * 2**20)
    return sum(2.0 ** math.ceil(math.log2(size)) for size in large) + math.ceil(small / (20 * 2**20)) * 2**25


def refit_bytes(config: RunConfig, counts: ParameterCounts) -> float:
    """Bytes that a refit writes into one rank of the engine, in bf16 whatever the engine makes of them."""
    if not config.model.freeze_vision:
        return BF16 * counts.engine(config.rollout.tensor_parallel)
    return BF16 * sum(stage.language for stage in counts.stages(config.rollout.tensor_parallel, 1))


def engine_weight_bytes(config: RunConfig, architecture: Architecture, counts: ParameterCounts) -> float:
    """Weights of one rank of the engine; in FP8 those of the decoder's linears are a byte each."""
    elements = counts.engine(config.rollout.tensor_parallel)
    if not config.rollout.fp8:
        return BF16 * elements
    linears = sum(stage.layers for stage in counts.stages(config.rollout.tensor_parallel, 1))
    return BF16 * elements - linears
