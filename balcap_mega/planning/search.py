"""Predicts every layout of a run on a cluster; lists the fastest first, and why the others are not possible."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from balcap_mega.errors import UserError
from balcap_mega.planning.judge import JudgeServers
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Plan, Planner

ROW_TOKENS = (4096, 8192, 16384, 32768)
MEMORY_FRACTIONS = (0.5, 0.6, 0.7, 0.8)
HEADROOM = 0.05
"""Share of a GPU's memory that the chosen layout leaves free, if any does: a prediction is not a measurement."""

TIE = 0.01
"""Layouts whose steps, without the wait for the judge, take within this share of the best are as good: the simplest is
chosen."""


@dataclass(frozen=True)
class Refusal:
    layout: Layout
    reason: str


@dataclass(frozen=True)
class Search:
    """plans: possible layouts, fastest first. refusals: the others, in the order tried. memory: bytes of one GPU."""

    plans: tuple[Plan, ...]
    refusals: tuple[Refusal, ...]
    memory: float

    @property
    def best(self) -> Plan:
        """The simplest of the plans that are as fast as the fastest of those with headroom: fewest cuts, then least
        recomputation, then the smallest share of memory for the engine.

        Raises UserError where no layout can be.
        """
        if not self.plans:
            raise UserError("no layout of this run fits this cluster", remedy="give it more nodes (--nodes)")
        roomy = [plan for plan in self.plans if plan.memory.fullest.total <= (1 - HEADROOM) * self.memory]
        candidates = roomy or self.plans
        limit = (1 + TIE) * candidates[0].own_seconds
        return min((plan for plan in candidates if plan.own_seconds <= limit), key=_complexity)


def search(planner: Planner, *, fp8: bool = False) -> Search:
    """Predict all layouts; `fp8` also tries FP8 in training and rollouts, which otherwise stay as configured."""
    plans, refusals = [], []
    for layout in layouts(planner, fp8=fp8):
        found = _smallest_engine(planner, layout)
        (plans if isinstance(found, Plan) else refusals).append(found)
    plans.sort(key=lambda plan: plan.own_seconds)
    return Search(tuple(plans), tuple(refusals), planner.cluster.gpu.memory)


@dataclass(frozen=True)
class Split:
    """Numbers of nodes for training and for judging; the former's best layout, and the latter's captions a second."""

    training: int
    judging: int
    plan: Plan
    rate: float


def split_nodes(planner: Planner, model: str, nodes: int, *, fp8: bool = False) -> list[Split]:
    """Every way to share `nodes` out between training and judging, the fastest step first.

    Raises UserError where none can be.
    """
    found, reasons = [], []
    for judging in range(1, nodes):
        cluster = replace(planner.cluster, nodes=nodes - judging)
        try:
            servers = JudgeServers.of(model, judging * cluster.gpus_per_node, cluster, planner.workload)
            rate = servers.captions_per_second(planner.workload)
            plan = search(replace(planner, cluster=cluster, captions_per_second=rate, _known={}), fp8=fp8).best
        except UserError as error:
            reasons.append(error)
        else:
            found.append(Split(nodes - judging, judging, plan, rate))
    if not found:
        raise reasons[-1] if reasons else UserError(f"{nodes} nodes cannot be shared", remedy="give at least two")
    return sorted(found, key=lambda split: split.plan.step_seconds)


def _smallest_engine(planner: Planner, layout: Layout) -> Plan | Refusal:
    """`layout` with the smallest `memory_fraction` of those with which it is fastest; a refusal if none fits."""
    found: Plan | Refusal | None = None
    for fraction in MEMORY_FRACTIONS:
        layout = replace(layout, memory_fraction=fraction)
        try:
            plan = planner.plan(layout)
        except UserError as error:
            found = found or Refusal(layout, error.problem)
            continue
        if isinstance(found, Plan) and found.own_seconds <= plan.own_seconds:
            break
        found = plan
    assert found is not None, "there are fractions to try"
    return found


def layouts(planner: Planner, *, fp8: bool) -> Iterator[Layout]:
    """Tensor parallelism within a node, any number of pipeline stages that divides the nodes' GPUs; each with the
    smallest engine."""
    cluster, configured = planner.cluster, Layout.of(planner.config)
    in_node = [size for size in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == 0]
    stages = [size for size in range(1, cluster.gpus + 1) if cluster.gpus % size == 0]
    precisions = [(configured.fp8, configured.engine_fp8)] + ([("hybrid", True)] if fp8 else [])
    shortest_row = planner.config.rollout.max_model_len
    for tensor, pipeline in product(in_node, stages):
        if cluster.gpus % (tensor * pipeline):
            continue
        for sequence, recompute, row_tokens, engine_tensor, (precision, engine_fp8) in product(
            (True, False) if tensor > 1 else (False,),
            ("none", "selective", "full"),
            [tokens for tokens in ROW_TOKENS if tokens >= shortest_row],
            in_node,
            precisions,
        ):
            yield Layout(
                tensor, pipeline, sequence, recompute, row_tokens, precision, engine_tensor, engine_fp8,
                memory_fraction=MEMORY_FRACTIONS[0],
            )  # fmt: skip


def _complexity(plan: Plan) -> tuple:
    layout = plan.layout
    return (
        layout.tensor * layout.pipeline,
        layout.pipeline,
        ("none", "selective", "full").index(layout.recompute),
        layout.engine_tensor,
        layout.memory_fraction,
        layout.row_tokens,
    )
