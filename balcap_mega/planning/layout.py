"""The keys of a run that the planner chooses, as one value."""

from dataclasses import dataclass
from typing import Literal

from balcap_mega.config.schema import RunConfig


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over its GPUs. No other key of a `RunConfig` is searched over."""

    tensor: int
    pipeline: int
    sequence: bool
    recompute: Literal["none", "selective", "full"]
    row_tokens: int
    fp8: Literal["none", "hybrid", "e4m3"]
    engine_tensor: int
    engine_fp8: bool
    memory_fraction: float

    @classmethod
    def of(cls, config: RunConfig) -> "Layout":
        return cls(
            tensor=config.parallel.tensor,
            pipeline=config.parallel.pipeline,
            sequence=config.parallel.sequence,
            recompute=config.model.recompute,
            row_tokens=config.packing.row_tokens,
            fp8=config.model.fp8,
            engine_tensor=config.rollout.tensor_parallel,
            engine_fp8=config.rollout.fp8,
            memory_fraction=config.rollout.memory_fraction,
        )

    def apply(self, config: RunConfig) -> RunConfig:
        """`config` with this layout's keys."""
        sections = {
            "parallel": {"tensor": self.tensor, "pipeline": self.pipeline, "sequence": self.sequence},
            "model": {"recompute": self.recompute, "fp8": self.fp8},
            "packing": {"row_tokens": self.row_tokens},
            "rollout": {
                "tensor_parallel": self.engine_tensor,
                "fp8": self.engine_fp8,
                "memory_fraction": self.memory_fraction,
            },
        }
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
        )

    def overrides(self) -> list[str]:
        """The layout as `key=value` arguments of a command line."""
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"model.recompute={self.recompute}",
            f"model.fp8={self.fp8}",
            f"packing.row_tokens={self.row_tokens}",
            f"rollout.tensor_parallel={self.engine_tensor}",
            f"rollout.fp8={str(self.engine_fp8).lower()}",
            f"rollout.memory_fraction={self.memory_fraction:g}",
        ]

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += ["SP"] if self.sequence else []
        parts += [f"recompute {self.recompute}", f"rows of {self.row_tokens}"]
        parts += [f"FP8 {self.fp8}"] if self.fp8 != "none" else []
        engine = f"engine TP{self.engine_tensor} at {self.memory_fraction:g}"
        return ", ".join([*parts, engine + (" FP8" if self.engine_fp8 else "")])
