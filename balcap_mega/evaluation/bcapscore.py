"""b-CapScore of BalCapRL: the harmonic mean of precision, recall and linguistic quality, by the MLLM judge."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from typing_extensions import TypedDict

from balcap_mega.algorithm.words import count_words
from balcap_mega.data.files import ImageFileDataset
from balcap_mega.data.jsonl import drop_cut_line
from balcap_mega.errors import UserError
from balcap_mega.evaluation.session import read_json_lines
from balcap_mega.rewards.judge import COMPONENTS, Judge, Judgement, b_capscore

AHEAD = 256  # captions under judgement at once; each holds its picture


class Entry(TypedDict):
    """What is read of a line of results; more stands there."""

    image: str
    caption: str
    precision: float | None
    recall: float | None
    linguistic: float | None


@dataclass(frozen=True)
class BCapScoreRun:
    """Captions by image path, the dataset that holds images and references, and the JSON Lines file of results."""

    dataset: ImageFileDataset
    captions: dict[str, str]
    output: Path

    def run(self, judge: Judge, progress: Callable[[], None] = lambda: None) -> int:
        """Judge the captions that have no whole judgement in `output`; return how many still lack a component."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        drop_cut_line(self.output)
        done = {(entry["image"], entry["caption"]) for entry in self._whole_results()}
        waiting: deque[tuple[str, str, Future[Judgement]]] = deque()
        incomplete = 0

        def finish_oldest(file) -> None:
            nonlocal incomplete
            image, caption, judgement = waiting.popleft()
            entry = _entry(image, caption, judgement.result())
            incomplete += None in (entry[name] for name in COMPONENTS)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            progress()

        with self.output.open("a", encoding="utf-8") as file:
            for index, row in enumerate(self.dataset.rows):
                caption = self._caption(row.image)
                if (row.image, caption) in done:
                    progress()
                    continue
                waiting.append((row.image, caption, judge.submit(self.dataset[index], caption)))
                if len(waiting) >= AHEAD:
                    finish_oldest(file)
            while waiting:
                finish_oldest(file)
        return incomplete

    def summarize(self) -> dict[str, float]:
        """Means × 100 of each component over the captions that have it, and their harmonic mean."""
        found = {(entry["image"], entry["caption"]): entry for entry in self._results()}
        latest = [found[key] for row in self.dataset.rows if (key := (row.image, self._caption(row.image))) in found]
        means = {}
        for name in COMPONENTS:
            values = [entry[name] for entry in latest if entry[name] is not None]
            if not values:
                raise UserError(f"{self.output}: no caption has a {name}", remedy="run again with a working judge")
            means[name] = 100 * fmean(values)
        missing = sum(None in (entry[name] for name in COMPONENTS) for entry in latest)
        lengths = [count_words(entry["caption"]) for entry in latest]
        return {
            "b_capscore": b_capscore(**means),
            **means,
            "words": fmean(lengths),
            "captions": len(latest),
            "incomplete": missing,
        }

    def _caption(self, image: str) -> str:
        if image not in self.captions:
            raise UserError(
                f"captions: {image} has none", remedy="caption every image of the references, or narrow them"
            )
        return self.captions[image]

    def _results(self) -> Iterator["Entry"]:
        if self.output.exists():
            yield from read_json_lines(self.output, "b-CapScore's results", Entry)

    def _whole_results(self) -> Sequence["Entry"]:
        return [entry for entry in self._results() if None not in (entry[name] for name in COMPONENTS)]


def _entry(image: str, caption: str, judgement: Judgement) -> dict:
    assertions = None
    if judgement.assertions is not None:
        assertions = [{"text": a.text, "verdict": str(a.verdict)} for a in judgement.assertions]
    return {
        "image": image,
        "caption": caption,
        **judgement.components(),
        "assertions": assertions,
        "covered": judgement.covered,
        "clarity": judgement.clarity,
        "fluency": judgement.fluency,
        "coherency": judgement.coherency,
    }
