"""The whole run."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from balcap_mega.config.schema.algorithm import AlgorithmConfig
from balcap_mega.config.schema.base import MAY_CHANGE, Section
from balcap_mega.config.schema.benchmarks import BenchmarkConfig
from balcap_mega.config.schema.data import DataConfig
from balcap_mega.config.schema.health import HealthConfig
from balcap_mega.config.schema.learner import CheckpointConfig, OptimizerConfig, PackingConfig, WarmupConfig
from balcap_mega.config.schema.policy import ModelConfig, ParallelConfig
from balcap_mega.config.schema.rewards import RewardConfig
from balcap_mega.config.schema.rollout import ProfileConfig, RecordConfig, RolloutConfig


class RunConfig(Section):
    """One training run. `balcap_mega.config.load.load_config` builds it from YAML and `key=value` overrides."""

    output_dir: Annotated[str, MAY_CHANGE]
    """Folder for all that the run leaves behind; the same command goes on from what is there."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of data order, sampling, drawn scenes and random weights."""
    steps: Annotated[int, Field(ge=0), MAY_CHANGE] = 1000
    """Steps of reinforcement learning."""
    eval_every: Annotated[int, Field(ge=0), MAY_CHANGE] = 0
    """Steps between two evaluations on held-out records; 0: before and after only."""
    accept_changed: Annotated[tuple[Literal["rows", "checkpoint"], ...], MAY_CHANGE] = ()
    """Inputs that may have other content now than when the run began: the rows to train on, what model.path holds."""
    model: ModelConfig
    """The policy."""
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = ParallelConfig()
    """How the policy is laid out over ranks."""
    data: DataConfig = DataConfig()
    """Records and images."""
    warmup: WarmupConfig = WarmupConfig()
    """Supervised steps before RL."""
    rollout: RolloutConfig = RolloutConfig()
    """The vLLM engine and its sampling."""
    rewards: RewardConfig = RewardConfig()
    """Who judges."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """From rewards to gradients."""
    packing: Annotated[PackingConfig, MAY_CHANGE] = PackingConfig()
    """Microbatches."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    """What a run resumes from."""
    rollouts: Annotated[RecordConfig, MAY_CHANGE] = RecordConfig()
    """The steps' captions on record."""
    profile: Annotated[ProfileConfig, MAY_CHANGE] = ProfileConfig()
    """Which steps are profiled."""
    health: Annotated[HealthConfig, MAY_CHANGE] = HealthConfig()
    """What stops a run that has gone wrong."""
    benchmarks: Annotated[BenchmarkConfig, MAY_CHANGE] = BenchmarkConfig()
    """Benchmarks of the policy every `eval_every` steps."""

    @model_validator(mode="after")
    def benchmarks_are_judged(self):
        if self.benchmarks.wanted and not self.eval_every:
            raise ValueError("benchmarks are taken every eval_every=0 steps; set eval_every, such as 50")
        if self.benchmarks.wanted and not (self.benchmarks.endpoint or self.rewards.endpoint):
            raise ValueError("benchmarks have no judge; set benchmarks.endpoint.base_url and benchmarks.endpoint.model")
        return self

    @model_validator(mode="after")
    def judge_fits_data(self):
        if (self.rewards.judge == "scenes") != (self.data.source == "scenes"):
            raise ValueError(
                f"rewards.judge={self.rewards.judge} cannot judge data.source={self.data.source}; the rule-based judge "
                "knows only scenes: use judge=scenes with source=scenes and judge=mllm with any other"
            )
        return self

    @model_validator(mode="after")
    def components_are_known(self):
        controlled = () if self.algorithm.length_control == "none" else self.algorithm.gate.components
        for key, names in (("weights", self.algorithm.weights), ("gate.components", controlled)):
            if unknown := sorted(set(names) - set(self.rewards.components)):
                remedy = f"name some of {', '.join(map(repr, self.rewards.components))}"
                remedy += ", or set algorithm.length_control=none" if key == "gate.components" else ""
                raise ValueError(f"algorithm.{key}.{unknown[0]} names no component of rewards.components; {remedy}")
        if not any(self.algorithm.weights.get(name, 1.0) for name in self.rewards.components):
            raise ValueError("every component of rewards.components weighs 0; give one a positive algorithm.weights")
        return self

    @model_validator(mode="before")
    @classmethod
    def every_component_weighs(cls, tree: Any) -> Any:
        """Weights that are not given are 1 for each component."""
        try:
            names, algorithm = list(tree["rewards"]["components"]), tree.get("algorithm") or {}
            if "weights" in algorithm:
                return tree
            return tree | {"algorithm": algorithm | {"weights": dict.fromkeys(names, 1.0)}}
        except (KeyError, TypeError, AttributeError):  # nothing to weigh, or what the fields' own types will refuse
            return tree

    @model_validator(mode="after")
    def habits_are_of_scenes(self):
        if self.warmup.habits is not None and self.data.source != "scenes":
            raise ValueError(
                f"warmup.habits are of scenes, not of data.source={self.data.source}; set warmup.habits=null"
            )
        return self

    @model_validator(mode="after")
    def every_bucket_fills(self):
        if self.parallel.overlap_grad_reduce and not self.model.freeze_vision:
            raise ValueError(
                "parallel.overlap_grad_reduce=true would wait for gradients that a rank without an image never has; "
                "set model.freeze_vision=true, or parallel.overlap_grad_reduce=false parallel.bucket_size=null"
            )
        return self

    @model_validator(mode="after")
    def optimizer_fits_weights(self):
        optimizer = self.optimizer
        if self.model.dtype != "bfloat16" and (optimizer.precision_aware or optimizer.main_grads_dtype == "bfloat16"):
            key = "precision_aware=true" if optimizer.precision_aware else "main_grads_dtype=bfloat16"
            raise ValueError(f"optimizer.{key} is for bfloat16 weights; set model.dtype=bfloat16")
        if optimizer.precision_aware and not self.parallel.distributed_optimizer:
            raise ValueError(
                "optimizer.precision_aware=true needs the distributed one; set parallel.distributed_optimizer=true"
            )
        return self

    @model_validator(mode="after")
    def old_captions_are_corrected(self):
        if self.rollout.ahead and not self.algorithm.corrects:
            raise ValueError(
                "rollout.ahead=1 trains on captions of older weights; set algorithm.importance_cap, such as 2.0, or "
                "rollout.ahead=0"
            )
        return self

    @model_validator(mode="after")
    def fp8_rollouts_are_corrected(self):
        if self.rollout.fp8 and not self.algorithm.corrects:
            raise ValueError(
                "rollout.fp8=true samples from another policy than the one trained; set algorithm.importance_cap, "
                "such as 2.0, or rollout.fp8=false"
            )
        return self
