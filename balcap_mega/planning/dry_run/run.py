"""A dry run: a step of one rank of every pipeline stage."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from balcap_mega.config.schema import RunConfig
from balcap_mega.errors import UserError
from balcap_mega.planning.dry_run.step import DryStep, dry_step
from balcap_mega.planning.plan import Planner, read_model_config
from balcap_mega.planning.workload import pack_for


def dry_run(planner: Planner) -> Iterator[DryStep]:
    """Of each stage the first tensor-parallel rank, which has the largest images, among the first of the data-parallel
    ranks, which assembles the checkpoint; with the rows of the one that has the most to do.

    Raises UserError for what has no stand-in.
    """
    config, world = planner.config, planner.cluster.gpus
    refuse_what_has_no_stand_in(config)
    rows = pack_for(config, planner.architecture, planner.workload, world)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(read_model_config(config)), encoding="utf-8")
        for stage in range(config.parallel.pipeline):
            yield dry_step(
                config, Path(folder), planner.workload, rows, stage * world // config.parallel.pipeline, world
            )


def refuse_what_has_no_stand_in(config: RunConfig) -> None:
    for key, value, known in (
        ("model.fp8", config.model.fp8, "none"),
        ("model.attention", config.model.attention, "flash"),
        ("model.dtype", config.model.dtype, "bfloat16"),
        ("model.apply_rope_fusion", config.model.apply_rope_fusion, False),
        ("model.gradient_accumulation_fusion", config.model.gradient_accumulation_fusion, False),
        ("optimizer.precision_aware", config.optimizer.precision_aware, False),
    ):
        value, known = str(value).lower(), str(known).lower()
        if value != known:
            raise UserError(
                f"{key}={value}: a dry run has no stand-in for its kernels, and knows {key}={known} alone",
                remedy=f"set {key}={known}, and take what launch/plan.py says for {value}",
            )
