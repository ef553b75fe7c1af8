"""b-CapScore of BalCapRL: the harmonic mean of precision, recall and linguistic quality, by the MLLM judge.

b_capscore is the harmonic mean of the three corpus means. Each of them is over the captions that have that component,
so a caption that lacks one still enters the means of the others. mean_b_capscore is another number: the mean, over the
captions that have all three, of the harmonic mean of each. The first is what the paper reports, as we read it; the
second is lower wherever captions are good at one thing and bad at another.
"""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from typing_extensions import TypedDict

from balcap_mega.algorithm.words import count_words
from balcap_mega.data.annotations import LeftOut
from balcap_mega.data.files import ImageRow
from balcap_mega.data.image_files import refuse_outside
from balcap_mega.data.jsonl import drop_cut_line, read_jsonl
from balcap_mega.data.records import CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import read_json_lines
from balcap_mega.rewards.judge import COMPONENTS, Judge, Judgement, b_capscore

AHEAD = 256  # captions under judgement at once; each holds its picture
PROTOCOL = 2  # raised when the same replies come to be scored otherwise


class Entry(TypedDict):
    """What is read of a line of results; more stands there. row: the row's number among the references, from 0."""

    row: int
    image: str
    caption: str
    precision: float | None
    recall: float | None
    linguistic: float | None


def read_references(path: Path) -> list[ImageRow]:
    """The rows of a file of references. Raises UserError for one that cannot be used: no reference goes missing."""
    rows = []
    for row in read_jsonl(path):
        if isinstance(row, LeftOut):
            raise UserError(str(row), remedy="mend that line, or take it out")
        refuse_outside(row.image, str(path))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class BCapScoreRun:
    """One caption a row of the references, their pictures, and the JSON Lines file of results.

    An image may have several rows, with a reference each; its caption is then judged once for every one of them.
    """

    rows: Sequence[ImageRow]
    captions: dict[str, str]
    pictures: Pictures
    output: Path

    def check(self) -> None:
        """Raise UserError for an image without a caption, unless its picture cannot be used anyway."""
        for row in self.rows:
            if row.image not in self.captions and row.image not in self.pictures.unusable:
                raise UserError(
                    f"captions: {row.image} has none", remedy="caption every image of the references, or narrow them"
                )

    def run(self, judge: Judge, progress: Callable[[], None] = lambda: None) -> Counter[str]:
        """Judge the rows that have no whole judgement in `output`; count those that still lack something, by what."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        drop_cut_line(self.output)
        done = {number for number, entry in self._latest().items() if not _lacks(entry)}
        waiting: deque[tuple[int, Future[Judgement]]] = deque()
        incomplete: Counter[str] = Counter()

        def finish_oldest(file) -> None:
            number, judgement = waiting.popleft()
            entry = self._entry(number, judgement.result())
            if lacks := _lacks(entry):
                incomplete["no_" + "_no_".join(lacks)] += 1
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            progress()

        with self.output.open("a", encoding="utf-8") as file:
            for number, row in enumerate(self.rows):
                if row.image in self.pictures.unusable:
                    incomplete[self.pictures.unusable[row.image]] += 1
                elif number not in done:
                    waiting.append((number, judge.submit(self._record(row), self.captions[row.image])))
                    if len(waiting) >= AHEAD:
                        finish_oldest(file)
                    continue
                progress()
            while waiting:
                finish_oldest(file)
        return incomplete

    def summarize(self) -> dict[str, float]:
        """The scores, × 100; see the top of this module. Raises UserError if no caption has one of the components."""
        latest = self._latest().values()
        means = {}
        for name in COMPONENTS:
            values = [entry[name] for entry in latest if entry[name] is not None]
            if not values:
                raise UserError(f"{self.output}: no caption has a {name}", remedy="run again with a working judge")
            means[name] = 100 * fmean(values)
        whole = [entry for entry in latest if not _lacks(entry)]
        each = [100 * b_capscore(**{name: entry[name] for name in COMPONENTS}) for entry in whole]
        return {
            "b_capscore": b_capscore(**means),
            **({"mean_b_capscore": fmean(each)} if each else {}),
            **means,
            "words": fmean(count_words(entry["caption"]) for entry in latest),
            "captions": len(self.rows),
            "incomplete": len(self.rows) - len(whole),
        }

    def _record(self, row: ImageRow) -> CaptionRecord:
        return CaptionRecord(row.id, self.pictures.read(row.image), row.prompt, row.reference, row.units)

    def _latest(self) -> dict[int, Entry]:
        """The last line of each row: a row that lacked something is judged again, on a line of its own."""
        return {entry["row"]: entry for entry in self._results() if entry["row"] < len(self.rows)}

    def _results(self) -> Iterator[Entry]:
        if self.output.exists():
            yield from read_json_lines(self.output, "b-CapScore's results", Entry)

    def _entry(self, number: int, judgement: Judgement) -> dict:
        row, assertions = self.rows[number], None
        if judgement.assertions is not None:
            assertions = [{"text": a.text, "verdict": str(a.verdict)} for a in judgement.assertions]
        return {
            "row": number,
            "image": row.image,
            "caption": self.captions[row.image],
            **judgement.components(),
            "assertions": assertions,
            "covered": judgement.covered,
            "clarity": judgement.clarity,
            "fluency": judgement.fluency,
            "coherency": judgement.coherency,
        }


def _lacks(entry: Entry) -> list[str]:
    return [name for name in COMPONENTS if entry[name] is None]
