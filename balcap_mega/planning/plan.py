"""What a run would be like under a layout: memory by part, seconds by phase, speed; or why it cannot be."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from balcap_mega.config.preflight import check_batch, check_shape
from balcap_mega.config.schema import ParallelConfig, RunConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import update_flops, vision_forward
from balcap_mega.models.fp8 import check_fp8
from balcap_mega.models.released import RELEASED
from balcap_mega.planning.compute import Compute
from balcap_mega.planning.generation import Generation
from balcap_mega.planning.hardware import GIB, Cluster
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.memory import Memory, Moment, predict_memory, refit_bytes
from balcap_mega.planning.optimizer import OptimizerBytes
from balcap_mega.planning.parameters import ParameterCounts
from balcap_mega.planning.pictures import PictureWork
from balcap_mega.planning.update import Passes
from balcap_mega.planning.workload import SCORED_AHEAD, Rows, Workload, pack_for

PHASES = ("rollout", "swap", "rewards", "pictures", "update", "refit")
"""Of a step, as the trainer times them. "update" has the vision tower and all passes for logprobs, "scoring" with them.
"pictures" is the wait for them, which is part of the trainer's "rollout" and "packing".
"""


@dataclass(frozen=True)
class Plan:
    """One layout, predicted.

    seconds:                    by phase (`PHASES`)
    pictures:                   what they cost a rank's host
    update_seconds:             the update phase by part: vision, logprobs, train, optimizer
    tokens_per_second_per_gpu:  prompt and response tokens, each response with its prompt, over the whole step
    judge_has:                  seconds in which the judge holds nobody up: those of the rollout, or with
                                `rollout.ahead` all of the step that is not spent waiting for it
    update_mfu:                 `update_flops` over the update phase and the GPU's dense peak in the format of its GEMMs
    """

    layout: Layout
    data_size: int
    rows: Rows
    memory: Memory
    seconds: Mapping[str, float]
    pictures: PictureWork
    update_seconds: Mapping[str, float]
    tokens_per_second_per_gpu: float
    judge_has: float
    update_mfu: float

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def own_seconds(self) -> float:
        """The step without its wait for the judge, which is a matter of the judge's GPUs and not of the layout."""
        return self.step_seconds - self.seconds["rewards"]


@dataclass(frozen=True)
class Planner:
    """Predicts layouts of one run on one cluster.

    text:                 the language model's part of config.json, which `config.preflight` checks
    captions_per_second:  what the judge sustains; None for a judge that keeps up with generation
    """

    config: RunConfig
    architecture: Architecture
    text: Mapping[str, Any]
    counts: ParameterCounts
    cluster: Cluster
    workload: Workload
    captions_per_second: float | None = None
    _known: dict[tuple, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        config: RunConfig,
        cluster: Cluster,
        *,
        image_tokens: int | None = None,
        caption_tokens: float | None = None,
        captions_per_second: float | None = None,
        model_config: dict[str, Any] | None = None,
    ) -> "Planner":
        """model_config: what config.json says, by default that of `model.path`

        Raises UserError where the model is neither on this machine nor one of the released ones.
        """
        model_config = model_config or read_model_config(config)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
            architecture = Architecture.from_folder(folder)
        workload = Workload.of(config, architecture, image_tokens=image_tokens, caption_tokens=caption_tokens)
        text = model_config.get("text_config", model_config)
        counts = ParameterCounts(architecture)
        return cls(config, architecture, text, counts, cluster, workload, captions_per_second)

    def with_ahead(self, ahead: int) -> "Planner":
        """The same run with its captions sampled so many steps ahead."""
        config = self.config.model_copy(update={"rollout": self.config.rollout.model_copy(update={"ahead": ahead})})
        scored = SCORED_AHEAD * (ahead - self.config.rollout.ahead)
        workload = replace(self.workload, forward_passes=self.workload.forward_passes + scored)
        return replace(self, config=config, workload=workload, _known={})

    def plan(self, layout: Layout, *, must_fit: bool = True) -> Plan:
        """Predict one layout.

        Raises UserError where the run itself would refuse it or, if it `must_fit`, where memory does not suffice.
        """
        config, world = layout.apply(self.config), self.cluster.gpus
        check_batch(config, world)
        check_shape(dict(self.text), config.parallel, config.rollout)
        self.architecture.check_layout(config.parallel)
        check_fp8(self.architecture, config.model, config.parallel)
        rows = pack_for(config, self.architecture, self.workload, world)
        memory = predict_memory(config, self.architecture, self.counts, self.workload, rows, self.cluster.gpu)
        if must_fit:
            self._check_memory(memory)
        update = self._once(lambda: self._update(config, rows), config.parallel, config.model, config.packing)
        seconds = self._seconds(config, memory, rows, sum(update.values()))
        engines = world // config.rollout.tensor_parallel
        pictures = PictureWork.of(config, self.architecture, self.workload, rows, engines)
        seconds["pictures"] = pictures.left(seconds, config.rollout.ahead)
        step, data_size = sum(seconds.values()), rows.data_size
        flops = self._once(self._update_flops, "flops")
        peak = self.cluster.gpu.peak.of("bfloat16" if config.model.fp8 == "none" else "fp8")
        return Plan(
            layout=layout,
            data_size=data_size,
            rows=rows,
            memory=memory,
            seconds=seconds,
            pictures=pictures,
            update_seconds=update,
            tokens_per_second_per_gpu=self.workload.tokens / step / world,
            judge_has=self._judge_has(config, seconds),
            update_mfu=flops / seconds["update"] / world / peak,
        )

    def _update_flops(self) -> float:
        workload, trains_vision = self.workload, not self.config.model.freeze_vision
        vision = workload.prompts * vision_forward(self.architecture, workload.image_tokens)
        return update_flops(self.architecture, workload.computed, vision, trains_vision=trains_vision)

    def _update(self, config: RunConfig, rows: Rows) -> dict[str, float]:
        """The update phase by part."""
        parallel = config.parallel
        compute = Compute(
            self.architecture,
            self.cluster,
            parallel.tensor,
            parallel.sequence,
            config.model.recompute,
            fp8=config.model.fp8 != "none",
            image_tokens=self.workload.image_tokens,
            fused_rope=config.model.apply_rope_fusion,
        )
        stages = self.counts.stages(parallel.tensor, parallel.pipeline)
        passes = Passes(
            compute,
            tuple(self.architecture.layers_per_stage(parallel.pipeline)),
            rows.data_size,
            parameters=max(stage.language for stage in stages),
            speed=self.cluster.efficiency.rows,
            distributed_optimizer=parallel.distributed_optimizer,
            optimizer=OptimizerBytes.of(config.optimizer),
            fused_gradients=config.model.gradient_accumulation_fusion,
            bucket=self._bucket(parallel, rows.data_size),
        )
        updates = self.workload.updates
        parts = {name: updates * seconds for name, seconds in passes.update(rows).items()}
        vision = updates * compute.vision(rows.encoded(parallel.tensor)) / self.cluster.efficiency.rows
        logprobs = updates * self.workload.forward_passes * passes.forward(rows)
        return {"vision": vision, "logprobs": logprobs, **parts}

    def _bucket(self, parallel: ParallelConfig, data_size: int) -> int | None:
        """Parameters of a bucket, as Megatron has them by default or as configured; None without overlap."""
        if not parallel.overlap_grad_reduce:
            return None
        return parallel.bucket_size or max(40_000_000, 1_000_000 * data_size)

    def _seconds(self, config: RunConfig, memory: Memory, rows: Rows, update: float) -> dict[str, float]:
        cluster, engine_tensor = self.cluster, config.rollout.tensor_parallel
        generation = Generation(
            self.architecture, cluster, engine_tensor, 1 if config.rollout.fp8 else 2, memory.cache_tokens
        )
        rollout = self._once(lambda: generation.seconds(self.workload, cluster.gpus // engine_tensor), config.rollout)
        judged = self.workload.captions / self.captions_per_second if self.captions_per_second else 0.0
        # The optimizer's state goes and comes; the engine's weights do, as it falls asleep and wakes up.
        host = memory.swapped / cluster.gpu.host
        parallel = config.parallel
        stride = parallel.tensor * rows.data_size if parallel.pipeline > 1 else 1
        transfer = refit_bytes(config, self.counts) / cluster.bandwidth(parallel.pipeline, stride)
        own = {"rollout": rollout, "swap": host, "rewards": 0.0, "update": update, "refit": host + transfer}
        return own | {"rewards": max(judged - self._judge_has(config, own), 0.0)}

    def _judge_has(self, config: RunConfig, seconds: Mapping[str, float]) -> float:
        """`Plan.judge_has` of a step's seconds by phase."""
        return sum(seconds.values()) - seconds["rewards"] if config.rollout.ahead else seconds["rollout"]

    def _once(self, predict: Callable[[], Any], *key: Any) -> Any:
        """What `predict` returns, computed once for each key: many layouts differ in a few of their keys alone."""
        if key not in self._known:
            self._known[key] = predict()
        return self._known[key]

    def _check_memory(self, memory: Memory) -> None:
        limit = self.cluster.gpu.memory
        if (moment := memory.fullest).total > limit:
            raise UserError(
                f"out of memory in {moment.name} by {(moment.total - limit) / GIB:.1f} GiB: {largest_parts(moment)}",
                remedy="launch/plan.py --search tries the other layouts",
            )
        per_caption = self.workload.prefix_tokens + self.workload.max_tokens
        if memory.cache_tokens < per_caption:
            raise UserError(
                f"the engine's cache would hold {max(memory.cache_tokens, 0):.0f} tokens, and one caption with its "
                f"prompt takes {per_caption}",
                remedy="raise rollout.memory_fraction or rollout.tensor_parallel",
            )


def largest_parts(moment: Moment, count: int = 3) -> str:
    """The moment's largest parts, in GiB."""
    parts = sorted(moment.parts.items(), key=lambda part: -part[1])[:count]
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts)


def read_model_config(config: RunConfig) -> dict[str, Any]:
    """config.json of `model.path`; where that folder is not on this machine, the released model of that name."""
    if config.model.path is None:
        raise UserError("model.tiny is made for tests", remedy="plan a run whose config has model.path")
    path = Path(config.model.path) / "config.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    name = Path(config.model.path).name.lower()
    for released, sizes in RELEASED.items():
        if name.startswith(released.lower()):
            return sizes
    raise UserError(
        f"model.path={config.model.path} is not on this machine and is no released model",
        remedy=f"give the folder, or a name that begins with one of: {', '.join(RELEASED)}",
    )
