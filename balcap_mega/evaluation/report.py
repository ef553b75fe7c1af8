"""Progress while a run lasts; then its figures as a JSON file and as a table to read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from balcap_mega.evaluation.session import Coverage, Spending, write_json


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; each call of what this yields moves it one on."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def write_report(
    path: Path,
    title: str,
    figures: dict[str, float],
    breakdown: Sequence[dict],
    coverage: Coverage,
    this_run: Spending,
    all_runs: Spending,
    origins: dict,
) -> None:
    """Write `path` and print the table. Scores are on a scale of 100; `origins` says what they were made from."""
    report = {
        "benchmark": title,
        "figures": figures,
        "breakdown": list(breakdown),
        "judged": coverage.judged,
        "to_judge": coverage.total,
        "not_judged": coverage.missing,
        **origins,
        "spent_this_run": asdict(this_run),
        "spent_all_runs": asdict(all_runs),
    }
    write_json(path, report)
    console = Console(markup=False)  # names of parts come from files, and may hold brackets
    console.print(_table(title, ["", "value"], [[name, _shown(value)] for name, value in figures.items()]))
    if breakdown:
        names = list(breakdown[0])
        console.print(_table("", names, [[_shown(row[name]) for name in names] for row in breakdown]))
    console.print(str(coverage))
    cost = "" if all_runs.dollars is None else f", ${all_runs.dollars:.2f}"
    console.print(
        f"{all_runs.requests} requests, {all_runs.prompt_tokens} prompt and {all_runs.completion_tokens} completion "
        f"tokens in all runs ({this_run.requests} requests in this one){cost}; report in {path}"
    )


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number and rows and _is_number(rows[0][number]) else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _shown(value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).lstrip("-").isdigit()
