"""Compares rows of `benchmarks/throughput.py` with their predictions, and fits constants to them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError
from balcap_mega.models.released import RELEASED
from balcap_mega.planning.hardware import GIB, Cluster, Efficiency
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Plan, Planner
from balcap_mega.planning.workload import Workload

ASSUMPTIONS = (
    "a rank is as fast beside others as alone: only collectives, pipeline bubbles and uneven rows are added",
    "shares of the hardware's rates depend on width, depth and tensor-parallel size only by the GEMMs' own traffic",
    "collectives reach the assumed share of NVLink and of one 400 Gb/s adapter a GPU, on an otherwise idle network",
    "captions are exponentially long, and in every engine one runs to rollout.max_tokens",
    "the judge is as fast as --judge-gpus make it, or as it was measured",
    "pictures have 2 megapixels, cost a core what benchmarks/images.py measured, and each rank has data.threads free",
    "memory of CUDA, NCCL and the engine's workspace is as assumed in planning/memory.py",
)
"""The assumptions of an extrapolation to a cluster, for the reader."""

MODEL_KEYS = (
    "dtype", "fp8", "fp8_recipe", "recompute", "apply_rope_fusion", "gradient_accumulation_fusion"
)  # fmt: skip
"""Of `model`, that a row states; one of before a key was there has its default."""
PARALLEL_KEYS = ("tensor", "pipeline", "sequence", "distributed_optimizer", "overlap_grad_reduce", "bucket_size")


@dataclass(frozen=True)
class Comparison:
    """One measured number beside its prediction."""

    name: str
    unit: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class MeasuredRow:
    """One row of the benchmark's JSON, and its prediction under `Efficiency()`'s constants."""

    row: Mapping[str, Any]
    plan: Plan

    @property
    def name(self) -> str:
        row = self.row
        return f"{row['model']}, {row['layers']} layers, {row['world_size']} x {row['device']}"

    def comparisons(self) -> list[Comparison]:
        """Memory by part and, where the benchmark ran on a GPU, of the device by phase; seconds by phase."""
        memory, seconds = self.row["memory_gib"], self.row["seconds"]
        update, found = self.plan.memory.peak("update"), []
        for part in ("weights", "gradients", "optimizer"):
            if memory.get(part):
                found.append(Comparison(f"memory, {part}", "GiB", memory[part], update.parts[part] / GIB))
        for phase in ("rollout", "update"):
            if memory.get(f"{phase}_used"):
                predicted = self.plan.memory.peak(phase).total / GIB
                found.append(Comparison(f"memory, {phase}", "GiB", memory[f"{phase}_used"], predicted))
        for phase in ("rollout", "update", "swap", "refit"):
            found.append(Comparison(phase, "s", seconds[phase], self.plan.seconds[phase]))
        return found

    def efficiency(self) -> Efficiency:
        """The constants that would have predicted this row's rollout and update."""
        assumed, seconds = Efficiency(), self.row["seconds"]
        slower = {phase: seconds[phase] / self.plan.seconds[phase] for phase in ("rollout", "update")}
        return replace(
            assumed,
            rows=assumed.rows / slower["update"],
            decode=assumed.decode / slower["rollout"],
            engine_step=assumed.engine_step * slower["rollout"],
        )


def read_rows(path: Path) -> list[MeasuredRow]:
    """The file's rows. Raises UserError where it is not what the benchmark writes."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [MeasuredRow(row, _predict(row)) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", remedy="give a file of --json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no rows of benchmarks/throughput.py ({type(error).__name__}: {error})",
            remedy="write it with benchmarks/throughput.py --json",
        ) from None


def _predict(row: Mapping[str, Any]) -> Plan:
    sizes, layout, precision = row["sizes"], row["layout"], row["precision"]
    caption, prompt = sizes["caption_tokens"], sizes["prompt_tokens"]
    config = RunConfig(
        output_dir="unused",
        model={"path": row["model"], **{key: precision[key] for key in MODEL_KEYS if key in precision}},
        parallel={key: layout[key] for key in PARALLEL_KEYS if key in layout},
        optimizer=row.get("optimizer", {}),
        data={"train_size": sizes["prompts"]},
        rollout={
            "prompts_per_step": sizes["prompts"],
            "group_size": sizes["group_size"],
            "max_tokens": caption,
            "max_model_len": prompt + caption,
            "tensor_parallel": layout["engine_tensor"],
            "fp8": precision["rollout_fp8"],
            "memory_fraction": layout["memory_fraction"],
        },
        packing={"row_tokens": sizes["row_tokens"]},
    )
    in_node = min(row["world_size"], Cluster.gpus_per_node)
    cluster = Cluster(row["world_size"] // in_node, in_node)
    planner = Planner.of(config, cluster, model_config=_released(row["model"], row["layers"]))
    workload = replace(
        Workload.of(config, planner.architecture, image_tokens=sizes["image_tokens"], caption_tokens=caption),
        prefix_tokens=prompt,
        caption_tokens=caption,  # all of them run to the limit
    )
    return replace(planner, workload=workload).plan(Layout.of(config), must_fit=False)


def _released(model: str, layers: int) -> dict[str, Any]:
    """config.json of a released model, with that many decoder layers."""
    config = RELEASED[model]
    text = config.get("text_config", config) | {"num_hidden_layers": layers}
    return config | {"text_config": text} if "text_config" in config else text
