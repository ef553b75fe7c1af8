"""Prepare a dataset once: every image decoded, and units or questions of each row, all in one JSONL file to ship."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.jsonl import as_line, drop_cut_line, read_jsonl
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.failures import RequestFailed

AHEAD = 512  # rows that are being asked about at once; the endpoint's own limit is below


@dataclass
class PreparationReport:
    written: int = 0
    already_there: int = 0
    corrupt_images: int = 0
    failed: int = 0
    none_kept: int = 0  # rows written that have no question


def prepare(
    dataset: ImageFileDataset,
    output: str | Path,
    field: Literal["units", "questions"],
    ask: Callable[[int], Future[tuple]],
    progress: Callable[[], None] = lambda: None,
) -> PreparationReport:
    """Append each row, with what `ask(its index)` gives for `field`, to `output`; rows that are there already are left.

    A row whose image is corrupt, or about which the future raises RequestFailed, is left out and counted: run again to
    try those once more. `progress` is called once a row. Raises UserError for a row that stands there with another
    reference or prompt.
    """
    report = PreparationReport()
    done = _finished_rows(Path(output))
    waiting: deque[tuple[ImageRow, Future[tuple]]] = deque()

    def finish_oldest(file) -> None:
        row, asked = waiting.popleft()
        try:
            found = asked.result()
            file.write(as_line(replace(row, **{field: found})) + "\n")
            file.flush()
            report.written += 1
            report.none_kept += not found
        except RequestFailed:
            report.failed += 1
        progress()

    with Path(output).open("a", encoding="utf-8") as file:
        for index, row in enumerate(dataset.rows):
            if (earlier := done.get((row.id, row.image))) is not None:
                if (earlier.reference, earlier.prompt) != (row.reference, row.prompt):
                    raise UserError(
                        f"{output} holds row {row.id!r} with another reference or prompt than the data has now",
                        remedy=f"name another --output, or delete {output} to prepare anew",
                    )
                report.already_there += 1
            elif not dataset.is_sound(index):
                report.corrupt_images += 1
            else:
                waiting.append((row, ask(index)))
                if len(waiting) >= AHEAD:
                    finish_oldest(file)
                continue
            progress()
        while waiting:
            finish_oldest(file)
    return report


def _finished_rows(output: Path) -> dict[tuple[str, str], ImageRow]:
    """The rows in `output`, by (id, image)."""
    drop_cut_line(output)
    if not output.exists():
        return {}
    return {(row.id, row.image): row for row in read_jsonl(output) if isinstance(row, ImageRow)}
