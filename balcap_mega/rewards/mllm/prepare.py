"""Prepare a dataset once: every image decoded, every reference's units extracted, all in one JSONL file to ship."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.jsonl import as_line, drop_cut_line, read_jsonl
from balcap_mega.errors import UserError
from balcap_mega.rewards.mllm.failures import RequestFailed
from balcap_mega.rewards.mllm.judge import MllmJudge

AHEAD = 512  # rows whose units are being asked for at once; the endpoint's own limit is below


@dataclass
class PreparationReport:
    written: int = 0
    already_there: int = 0
    corrupt_images: int = 0
    failed_units: int = 0


def prepare(
    dataset: ImageFileDataset,
    output: str | Path,
    judge: MllmJudge,
    progress: Callable[[], None] = lambda: None,
) -> PreparationReport:
    """Append each row, with its units, to `output`; rows that stand there already are left as they are.

    A row whose image is corrupt, or whose units no attempt could extract, is left out and counted: run again to try
    those once more. `progress` is called once a row. Raises UserError for a row that stands there with another
    reference or prompt.
    """
    report = PreparationReport()
    done = _finished_rows(Path(output))
    waiting: deque[tuple[ImageRow, Future[tuple[str, ...]]]] = deque()

    def finish_oldest(file) -> None:
        row, units = waiting.popleft()
        try:
            file.write(as_line(replace(row, units=units.result())) + "\n")
            file.flush()
            report.written += 1
        except RequestFailed:
            report.failed_units += 1
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
                waiting.append((row, judge.submit_units(row.reference)))
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
