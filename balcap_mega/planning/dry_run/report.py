"""What a dry run found, as text and as plain values."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balcap_mega.planning.dry_run import compare
from balcap_mega.planning.dry_run.collectives import Collectives
from balcap_mega.planning.dry_run.compare import Figure
from balcap_mega.planning.dry_run.gpu_branches import STAND_INS
from balcap_mega.planning.dry_run.step import DryStep
from balcap_mega.planning.hardware import GIB
from balcap_mega.planning.plan import Plan, Planner


def print_step(console: Console, step: DryStep, planner: Planner, plan: Plan) -> None:
    """One rank's step, beside the planner's figures for it."""
    grid = step.grid
    console.print(
        Text(f"\nRank {step.rank}: pipeline stage {grid.pipeline_rank} of {grid.pipeline_size}", "bold"),
        f"(tensor rank {grid.tensor_rank} of {grid.tensor_size}, {grid.data_size} data-parallel ranks); "
        f"rows of {', '.join(map(str, step.rows))} tokens; {step.seconds:.0f} s",
    )
    _print_figures(console, "GiB of the learner on its device, at the peak", compare.memory_figures(step, plan), GIB)
    _print_figures(console, "TFLOP of a step", compare.flop_figures(step, planner, plan), 1e12)
    _print_collectives(console, step, planner)
    _print_figures(console, "GiB of a refit", compare.refit_figures(step, planner), GIB)
    _print_figures(console, "GiB of the host's memory", compare.host_figures(step, plan), GIB)
    console.print(Text("The host waits for the device", "bold"))
    for (moment, place), count in sorted(step.waits.count.items()):
        console.print(f"  {moment}: {count} x {place}", soft_wrap=True)


def print_need(console: Console, steps: Sequence[DryStep], plan: Plan, memory: float) -> None:
    """What a GPU must have: the learner's part found, the rest planned."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"GiB of {memory / GIB:.1f} of a GPU: the learner as found; engine, context, fragmentation as planned",
        title_justify="left",
    )
    needs = [compare.device_need(step, plan) for step in steps]
    for name in ("stage", *needs[0]):
        table.add_column(name, justify="right")
    for step, need in zip(steps, needs, strict=True):
        table.add_row(str(step.grid.pipeline_rank), *(f"{size / GIB:.1f}" for size in need.values()))
    console.print(table)


def print_stand_ins(console: Console, steps: Sequence[DryStep]) -> None:
    console.print(Text("\nA GPU's branches ran, on tensors without memory. In place of what is native there:", "bold"))
    for name, what in STAND_INS.items():
        if calls := sum(step.stand_ins.get(name, 0) for step in steps):
            console.print(f"  {name}, {calls:,} calls: {what}")
    console.print("  other ranks: collectives are counted, and nothing is sent")
    console.print("  the engine: a refit's pieces are packed and counted, and written nowhere")


def _print_figures(console: Console, title: str, figures: Sequence[Figure], unit: float) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("", "dry run", "planner", "difference"):
        table.add_column(name, justify="right" if name else "left")
    for figure in figures:
        table.add_row(figure.name, f"{figure.found / unit:,.2f}", *_planned(figure, unit))
    console.print(table)


def _planned(figure: Figure, unit: float) -> tuple[str, str]:
    planned = "" if figure.planned is None else f"{figure.planned / unit:,.2f}"
    return planned, "" if figure.difference is None else f"{figure.difference:+.1%}"


def _print_collectives(console: Console, step: DryStep, planner: Planner) -> None:
    planned = compare.data_parallel_figures(step, planner)
    table = Table(box=SIMPLE_HEAD, title="Collectives", title_justify="left")
    for name in ("of", "group", "operation", "count", "GiB", "planner", "difference"):
        table.add_column(name, justify="left" if name in ("of", "group", "operation") else "right")
    for of, collectives in (("step", step.collectives), ("refit", step.refit_collectives)):
        for key, count in sorted(collectives.count.items()):
            figure = Figure("", collectives.size[key], planned.get(key))
            table.add_row(of, *key, f"{count:,}", f"{figure.found / GIB:,.3f}", *_planned(figure, GIB))
    console.print(table)


def as_json(step: DryStep, planner: Planner, plan: Plan) -> dict[str, Any]:
    """The same: bytes, FLOPs, counts; of each figure also the planner's."""

    def pairs(figures: Sequence[Figure]) -> dict[str, Any]:
        return {figure.name: {"found": figure.found, "planned": figure.planned} for figure in figures}

    def counted(collectives: Collectives) -> list[dict[str, Any]]:
        return [
            {"group": group, "operation": operation, "count": count, "bytes": collectives.size[group, operation]}
            for (group, operation), count in sorted(collectives.count.items())
        ]

    return {
        "rank": step.rank,
        "stage": step.grid.pipeline_rank,
        "rows": step.rows,
        "memory": {name: peak.parts for name, peak in step.peaks.items()},
        "memory_compared": pairs(compare.memory_figures(step, plan)),
        "flops": pairs(compare.flop_figures(step, planner, plan)),
        "collectives": {"step": counted(step.collectives), "refit": counted(step.refit_collectives)},
        "refit": pairs(compare.refit_figures(step, planner)),
        "host": pairs(compare.host_figures(step, plan)),
        "waits": [
            {"moment": moment, "what": place.what, "where": place.where, "asked_by": place.asked_by, "count": count}
            for (moment, place), count in sorted(step.waits.count.items())
        ],
        "stand_ins": step.stand_ins,
        "device_need": compare.device_need(step, plan),
    }
