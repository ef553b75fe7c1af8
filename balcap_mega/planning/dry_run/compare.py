"""What a dry step found beside what the planner says of the same stage, and whether it fits."""

from dataclasses import dataclass

from balcap_mega.errors import UserError
from balcap_mega.models.flops import FLASH_PASSES, attention_forward, head_weights, layer_weights, vision_forward
from balcap_mega.planning.dry_run.step import DryStep
from balcap_mega.planning.hardware import BF16, GIB
from balcap_mega.planning.memory import CONTEXT, FRAGMENTATION, Moment, refit_bytes
from balcap_mega.planning.optimizer import OptimizerBytes
from balcap_mega.planning.plan import Plan, Planner
from balcap_mega.planning.workload import SCORED_AHEAD

UPDATE = "forward and backward"
"""The moment of a dry step that the planner calls "update"."""


HELD = ("weights", "gradients", "optimizer")
"""Kinds that stand through an update; the others pass."""


@dataclass(frozen=True)
class Figure:
    """planned: None where the planner has no such figure."""

    name: str
    found: float
    planned: float | None = None

    @property
    def difference(self) -> float | None:
        """Of the planner's from what was found, as a share of that."""
        return self.planned / self.found - 1 if self.planned is not None and self.found else None


def memory_figures(step: DryStep, plan: Plan) -> list[Figure]:
    """Bytes of the learner on its device."""
    grid = step.grid
    update, refit = (_planned(plan, name, grid.pipeline_rank).parts for name in ("update", "refit"))
    held = {kind: update[kind] for kind in HELD}
    passing = sum(update.get(part, 0.0) for part in ("activations", "working", "image embeddings", "head"))
    peak = step.peaks[UPDATE]
    figures = [Figure(f"{UPDATE}: {kind}", peak.parts[kind], size) for kind, size in held.items()]
    passes = {kind: size for kind, size in peak.parts.items() if kind not in HELD}
    figures.append(Figure(f"{UPDATE}: {', '.join(passes)}", sum(passes.values()), passing))
    figures += [Figure(f"{UPDATE}: most of {kind}, at its own time", peak.highest[kind]) for kind in passes]
    if grid.is_first_stage:
        embeddings = step.peaks["optimizer"].parts["images"]
        figures.append(Figure("image embeddings, kept for a step", embeddings, update["image embeddings"]))
    standing = sum(held.values())
    totals = {
        UPDATE: standing + passing,
        "optimizer": standing,
        "swap": standing,
        "rollout": held["weights"],
        "refit": refit["weights"] + refit["buckets"],
    }
    figures += [Figure(f"{moment}: all", peak.total, totals.get(moment)) for moment, peak in step.peaks.items()]
    return [figure for figure in figures if figure.found]


def flop_figures(step: DryStep, planner: Planner, plan: Plan) -> list[Figure]:
    """FLOPs that the planner's seconds are made of, those of recomputation too."""
    architecture, workload, config, rows = planner.architecture, planner.workload, planner.config, plan.rows
    grid, work = step.grid, rows.total
    layers = architecture.layers_per_stage(grid.pipeline_size)[grid.pipeline_rank]
    linear = layers * 2 * work.tokens * layer_weights(architecture) / grid.tensor_size
    attention = layers * attention_forward(architecture, work.pairs) / grid.tensor_size
    head = 2 * work.responses * head_weights(architecture) / grid.tensor_size * grid.is_last_stage
    vision = rows.encoded(grid.tensor_size) * vision_forward(architecture, workload.image_tokens) * grid.is_first_stage
    again = {"none": 0.0, "selective": attention, "full": linear + attention}[config.model.recompute]
    trained = 3 * (linear + head) + FLASH_PASSES * attention + again + (1 if config.model.freeze_vision else 3) * vision
    planned = {
        "scoring": SCORED_AHEAD * config.rollout.ahead * (linear + attention + head + vision),
        UPDATE: workload.updates * trained,
    }
    return [Figure(moment, found, planned.get(moment)) for moment, found in step.flops.items()]


def host_figures(step: DryStep, plan: Plan) -> list[Figure]:
    """Bytes of the host's memory that this rank takes; the planner's are those of the stage with most."""
    planned = plan.memory.host
    return [
        Figure("checkpoint, until it is written", step.checkpoint, planned["checkpoint"]),
        Figure("optimizer, while the engine generates", step.offloaded, planned.get("optimizer")),
    ]


def refit_figures(step: DryStep, planner: Planner) -> list[Figure]:
    """Bytes that one refit moves to and from this rank."""
    refit = step.refit
    needed = refit_bytes(planner.config, planner.counts)
    return [
        Figure("into the engine", refit.local_bytes + refit.received_bytes, needed),
        Figure("of these from other ranks", refit.received_bytes),
        Figure("sent to other ranks", refit.sent_bytes),
    ]


def data_parallel_figures(step: DryStep, planner: Planner) -> dict[tuple[str, str], float]:
    """Bytes by (group, operation) that the planner counts with: those of gradients and weights between replicas."""
    parallel = planner.config.parallel
    stage = planner.counts.stages(parallel.tensor, parallel.pipeline)[step.grid.pipeline_rank]
    trained = stage.language + (0 if planner.config.model.freeze_vision else stage.vision)
    if step.grid.data_size == 1:
        return {}
    gradient = OptimizerBytes.of(planner.config.optimizer).gradient
    if not parallel.distributed_optimizer:
        return {("data", "allreduce_coalesced"): planner.workload.updates * gradient * trained}
    return {
        ("data", "reduce_scatter_tensor_coalesced"): planner.workload.updates * gradient * trained,
        ("data", "allgather_into_tensor_coalesced"): planner.workload.updates * BF16 * trained,
    }


def device_need(step: DryStep, plan: Plan) -> dict[str, float]:
    """Bytes of the device at each moment: the learner's as found; what is not the learner's, and what is lost between
    blocks, as planned."""
    stage, peaks = step.grid.pipeline_rank, step.peaks
    names = {"update": UPDATE, "rollout": "rollout", "refit": "refit"}
    need = {}
    for name, moment in names.items():
        others = {"context": CONTEXT} | {
            part: size for part, size in _planned(plan, name, stage).parts.items() if part in ("engine", "asleep")
        }
        passing = peaks[moment].total - peaks["rollout"].total
        lost = FRAGMENTATION * passing if name == "update" else 0.0
        need[name] = peaks[moment].total + sum(others.values()) + lost
    return need


def refuse_what_does_not_fit(steps: list[DryStep], plan: Plan, memory: float) -> None:
    """Raise UserError, naming the fullest moment of all stages, if it takes more than `memory` bytes."""
    needs = [(size, name, step) for step in steps for name, size in device_need(step, plan).items()]
    size, name, step = max(needs, key=lambda need: need[0])
    own = step.peaks[UPDATE if name == "update" else name].total
    if size > memory:
        raise UserError(
            f"out of memory in {name} on pipeline stage {step.grid.pipeline_rank}: {size / GIB:.1f} GiB of "
            f"{memory / GIB:.1f}: the learner {own / GIB:.1f} as found, the rest {(size - own) / GIB:.1f} as planned",
            remedy="launch/plan.py --search tries the other layouts",
        )


def _planned(plan: Plan, name: str, stage: int) -> Moment:
    """The first of that name: of an update its passes over rows, which come before the optimizer's step."""
    return next(moment for moment in plan.memory.moments if moment.name == name and moment.stage == stage)
