"""Plans as people read them, and as programs do."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from balcap_mega.planning.hardware import GIB
from balcap_mega.planning.judge import JudgeServers, tokens
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.measured import ASSUMPTIONS, MeasuredRow
from balcap_mega.planning.plan import PHASES, Plan, Planner
from balcap_mega.planning.published import Published
from balcap_mega.planning.search import Refusal, Search, Split
from balcap_mega.planning.workload import Workload

PLAIN_WIDTH = 180  # of a log that is no terminal
SHOWN = 10
LEARNER_KEYS = ("tensor", "pipeline", "sequence", "recompute", "row_tokens", "fp8")


def make_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console


def print_facts(console: Console, planner: Planner) -> None:
    """What is planned, and what was taken for granted."""
    cluster, workload = planner.cluster, planner.workload
    console.print(Text(f"\n{planner.config.model.path} on {cluster.gpus} x {cluster.gpu.name}", "bold"))
    console.print(
        f"  a step: {workload.prompts} images x {workload.group} captions, prompts of {workload.prefix_tokens} tokens "
        f"({workload.image_tokens} of the image), captions of {workload.caption_tokens:g} on average and "
        f"{workload.max_tokens} at most"
    )


def print_judge(
    console: Console, workload: Workload, judge: JudgeServers | None, rate: float | None, plan: Plan
) -> None:
    """Who judges how fast, what the step waits for that, and what would hide it.

    judge: None where a rate was given.  rate: captions a second, None where no component is the judge's
    """
    if rate is None:
        console.print("  no component is the judge's; what rewards of your own take is not counted")
        return
    wait, has = plan.seconds["rewards"], plan.judge_has
    if judge is None:
        who = f"a judge of {rate:.2f} captions a second, as given"
    else:
        written, computed, shared = tokens(workload)
        who = (
            f"the judge, {judge.model} on {judge.gpus} GPUs as {judge.servers} x TP{judge.tensor}: {rate:.2f} captions "
            f"a second, of {written:.0f} tokens written, {computed:,.0f} read and {shared:,.0f} from the prefix cache"
        )
    console.print(f"  {who}")
    needed = workload.captions / has
    hidden = f"{needed:.1f} captions a second would hide it"
    if judge is not None:
        hidden = f"{judge.gpus_to_hide(workload, has)} judge GPUs would hide it ({needed:.1f} captions a second)"
    console.print(f"  a step waits {wait:.1f} s for it; {hidden}" if wait > 0 else "  its work hides")


def print_ahead(console: Console, planner: Planner, layout: Layout) -> None:
    """A step with captions of its own, and with captions that were sampled in the step before."""
    for ahead in (0, 1):
        plan = planner.with_ahead(ahead).plan(layout)
        console.print(
            f"  rollout.ahead={ahead}: {plan.step_seconds:.1f} s, {plan.seconds['rewards']:.1f} s of them waiting"
        )


def print_split(console: Console, splits: Sequence[Split]) -> None:
    """A budget of nodes, shared out between training and judging: each way that can be, the fastest first."""
    table = Table(box=SIMPLE_HEAD, title="nodes shared out between training and judge", title_justify="left")
    for name in ("training", "judge", "captions/s", "wait s", "step s", "layout"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for split in splits:
        wait, step = split.plan.seconds["rewards"], split.plan.step_seconds
        numbers = (f"{split.rate:.1f}", f"{wait:.1f}", f"{step:.1f}")
        table.add_row(str(split.training), str(split.judging), *numbers, str(split.plan.layout))
    console.print(table)


def print_plan(console: Console, planner: Planner, plan: Plan) -> None:
    """One layout: memory by part and seconds by phase."""
    console.print(Text(f"\n{plan.layout}", "bold"))
    console.print(
        f"  data-parallel {plan.data_size}, {plan.rows.count} rows a rank and update, the longest of "
        f"{plan.rows.largest.tokens:.0f} tokens; the engine's cache holds {plan.memory.cache_tokens:,.0f} tokens"
    )
    moments = [plan.memory.peak(name) for name in ("rollout", "update", "refit")]
    table = Table(box=SIMPLE_HEAD, title="GiB on a GPU", title_justify="left")
    table.add_column("")
    for moment in moments:
        stage = f", stage {moment.stage}" if plan.layout.pipeline > 1 else ""
        table.add_column(f"{moment.name}{stage}", justify="right")
    for part in dict.fromkeys(part for moment in moments for part in moment.parts):
        table.add_row(part, *(_gib(moment.parts[part]) if part in moment.parts else "" for moment in moments))
    limit = planner.cluster.gpu.memory
    table.add_row(f"of {limit / GIB:.1f}", *(_gib(moment.total) for moment in moments), style="bold")
    console.print(table)

    table = Table(box=SIMPLE_HEAD, title="seconds of a step", title_justify="left")
    for phase in (*PHASES, "step"):
        table.add_column(phase, justify="right", style="bold" if phase == "step" else "")
    table.add_row(*(f"{plan.seconds[phase]:.2f}" for phase in PHASES), f"{plan.step_seconds:.2f}")
    console.print(table)
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in plan.update_seconds.items())
    console.print(
        f"  update: {parts}\n  {plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU over the step, MFU of the update "
        f"{plan.update_mfu:.1%}\n  host memory of a rank, GiB: "
        + ", ".join(f"{part} {_gib(size)}" for part, size in plan.memory.host.items())
        + f", pictures {_gib(plan.pictures.held)}"
    )
    console.print(
        f"  pictures of a rank: {plan.pictures.requests:.0f} for the engine and {plan.pictures.encoded:.0f} for the "
        f"learner take one core {plan.pictures.seconds:.1f} s, of which a step waits for {plan.seconds['pictures']:.2f}"
    )


def print_search(console: Console, planner: Planner, search: Search) -> None:
    """The fastest layouts, each with its leanest engine; why the others are refused; what to paste."""
    table = Table(box=SIMPLE_HEAD, title=f"{len(search.plans)} layouts fit", title_justify="left")
    for name in ("layout", "rollout", "update", "step s", "tok/s/GPU", "MFU", "GiB"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for plan in _distinct(search.plans)[:SHOWN]:
        table.add_row(
            str(plan.layout),
            f"{plan.seconds['rollout']:.1f}",
            f"{plan.seconds['update']:.1f}",
            f"{plan.step_seconds:.1f}",
            f"{plan.tokens_per_second_per_gpu:,.0f}",
            f"{plan.update_mfu:.1%}",
            _gib(plan.memory.fullest.total),
        )
    console.print(table)
    reasons = _grouped(search.refusals)
    console.print(Text(f"{len(search.refusals)} layouts are refused", "bold"))
    for reason, layouts in reasons[:SHOWN]:
        console.print(f"  {layouts[0]}: {reason}" + (f" (and {len(layouts) - 1} more)" if len(layouts) > 1 else ""))
    if len(reasons) > SHOWN:
        console.print(f"  and {len(reasons) - SHOWN} more reasons; --json FILE holds every layout with its own")
    console.print(Text("\nThe simplest of those within a hundredth of the fastest:", "bold"))
    print_plan(console, planner, search.best)
    console.print("\n" + " ".join(search.best.layout.overrides()), soft_wrap=True)


def print_published(console: Console, rows: Sequence[Published]) -> None:
    """The published rows beside their predictions."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("source", "row", "published", "predicted", "unit", "error", ""):
        table.add_column(name, justify="left" if name in ("source", "row", "unit") else "right")
    for row in rows:
        predicted = row.value * (1 + row.error())
        fitted = "fitted" if row.fitted else ""
        table.add_row(
            row.source, row.name, f"{row.value:g}", f"{predicted:.4g}", row.unit, f"{row.error():+.1%}", fitted
        )
    console.print(table)
    worst = max(rows, key=lambda row: abs(row.error()))
    held_out = sum(not row.fitted for row in rows)
    console.print(f"{held_out} of {len(rows)} rows are held out; the worst is {worst.error():+.1%} ({worst.name})")


def print_measured(console: Console, rows: Sequence[MeasuredRow]) -> None:
    """Measured numbers beside their predictions, row by row."""
    for row in rows:
        table = Table(box=SIMPLE_HEAD, title=row.name, title_justify="left")
        for name in ("", "measured", "predicted", "unit", "error"):
            table.add_column(name, justify="left" if name in ("", "unit") else "right")
        for found in row.comparisons():
            values = (f"{found.measured:.2f}", f"{found.predicted:.2f}", found.unit, f"{found.error:+.1%}")
            table.add_row(found.name, *values)
        console.print(table)


def print_assumptions(console: Console, row: MeasuredRow) -> None:
    """What an extrapolation from that row rests on."""
    efficiency = row.efficiency()
    console.print(Text(f"\nPredicted from {row.name}", "bold"))
    console.print(
        f"  its shares of the hardware's rates: rows {efficiency.rows:.2f}, decode {efficiency.decode:.2f}, "
        f"{1e3 * efficiency.engine_step:.1f} ms a decoding step; assuming that"
    )
    for assumption in ASSUMPTIONS:
        console.print(f"  - {assumption}")


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain values: bytes, seconds, tokens a second."""
    return {
        "layout": vars(plan.layout),
        "overrides": plan.layout.overrides(),
        "data_size": plan.data_size,
        "rows": plan.rows.count,
        "longest_row": plan.rows.largest.tokens,
        "memory": [{"moment": m.name, "stage": m.stage, "bytes": m.parts} for m in plan.memory.moments],
        "host_bytes": plan.memory.host,
        "cache_tokens": plan.memory.cache_tokens,
        "seconds": dict(plan.seconds),
        "update_seconds": dict(plan.update_seconds),
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "update_mfu": plan.update_mfu,
    }


def search_as_json(search: Search) -> dict[str, Any]:
    refused = [{"layout": vars(refusal.layout), "reason": refusal.reason} for refusal in search.refusals]
    return {"best": as_json(search.best), "plans": [as_json(plan) for plan in search.plans], "refused": refused}


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _learner(layout: Layout) -> tuple:
    return tuple(getattr(layout, key) for key in LEARNER_KEYS)


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest plan of each way to lay the learner out."""
    return list({_learner(plan.layout): plan for plan in reversed(plans)}.values())[::-1]


def _grouped(refusals: Sequence[Refusal]) -> list[tuple[str, list[Layout]]]:
    """Refusals that say the same, the commonest first."""
    grouped = defaultdict(list)
    for refusal in refusals:
        grouped[refusal.reason].append(refusal.layout)
    return sorted(grouped.items(), key=lambda entry: -len(entry[1]))
