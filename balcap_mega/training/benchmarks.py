"""CaptionQA and DCScore of the policy while it is trained: captioned between two steps, judged beside the next ones.

What goes wrong here is said and counted, and never ends or delays the training: a picture that does not fit, a judge
that is down, a reply that is no answer. Captions and results stand in `benchmarks/step_N/` of the run's folder, in the
benchmarks' own formats; a run that goes on asks for what was still missing.
"""

import asyncio
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from balcap_mega.config.schema import BenchmarkConfig, JudgeEndpoint, RunConfig
from balcap_mega.data.images import shrink
from balcap_mega.data.records import CaptionRecord, refuse_placeholders
from balcap_mega.errors import UserError
from balcap_mega.evaluation import captionqa, captionqa_questions, dcscore
from balcap_mega.evaluation.fingerprint import claim, digest, of_judge
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import Coverage, read_json, write_json
from balcap_mega.parallel.agreement import failing_together, from_first_rank
from balcap_mega.parallel.progress import progress
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.requests import RolloutRequest
from balcap_mega.training.observe.metrics import LATE_METRICS_FILE, read_metrics

log = logging.getLogger(__name__)
AT_ONCE = 64  # pictures held by an engine's rank

Figures = dict[str, float]
Score = Callable[[dict[str, str], Path, JudgeEndpoint], Figures]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's pictures, by the key of their captions, and how captions are scored into a folder."""

    name: str
    pictures: Pictures
    names: dict[str, str]
    score: Score


class Benchmarks:
    """The benchmarks of a run. Made, and asked to `caption`, on every rank; only the first one judges and reports.

    Raises UserError for files that cannot be read, before a model is loaded.
    """

    def __init__(self, config: RunConfig, folder: Path, device: torch.device):
        self.config: BenchmarkConfig = config.benchmarks
        self.folder = folder / "benchmarks"
        self.every = config.eval_every
        self.max_pixels = config.data.max_pixels
        self.endpoint = config.benchmarks.endpoint or config.rewards.endpoint
        self.leads = torch.distributed.get_rank() == 0
        self._arrived: queue.SimpleQueue[tuple[int, Figures]] = queue.SimpleQueue()
        self._judging: list[threading.Thread] = []
        with failing_together(device):
            refuse_placeholders(self.config.prompt, "benchmarks.prompt")
            benchmarks = _read(self.config) if self.leads else {}
            if benchmarks:
                ChatClient(self.endpoint)  # refuses a key that is not set
        looked_at = from_first_rank({name: (b.pictures, b.names) for name, b in benchmarks.items()})
        self.benchmarks = [
            Benchmark(name, pictures, names, benchmarks[name].score if self.leads else _scored_elsewhere)
            for name, (pictures, names) in looked_at.items()
        ]

    def go_on(self, steps: int) -> None:
        """After `steps` steps of an earlier process: judge what it captioned until then, drop what it did later."""
        if not self.leads:
            return
        rows = read_metrics(self.folder.parent, LATE_METRICS_FILE)
        known = {(row["step"], name) for row in rows for name in row}
        for path in sorted(self.folder.glob("step_*")):
            done = int(path.name.removeprefix("step_"))
            if done > steps:
                shutil.rmtree(path)
                continue
            for benchmark in self.benchmarks:
                captions, figures = (path / f"{benchmark.name}_{what}.json" for what in ("captions", "figures"))
                if figures.exists() and (done, f"benchmark/{benchmark.name}") not in known:
                    self._arrived.put((done, read_json(figures, "a benchmark's figures", dict[str, float])))
                elif captions.exists() and not figures.exists():
                    self._judge(benchmark, done, read_json(captions, "captions", dict[str, str]))

    def caption(self, engine: RolloutEngine, replica: Replica, steps: int) -> None:
        """If it is due, caption all pictures with the weights after `steps` steps, and begin to judge. A collective."""
        if not self.every or steps % self.every:
            return
        for benchmark in self.benchmarks:
            keys = [key for key, name in benchmark.names.items() if name in benchmark.pictures.digests]
            with progress.phase(f"benchmark {benchmark.name}", steps - 1):
                mine = self._captions(benchmark, engine, replica.shard(keys))
                captions = dict(zip(keys, replica.gather(mine), strict=True))
            if self.leads:
                self._judge(benchmark, steps, {key: text for key, text in captions.items() if text is not None})

    def report(self, record: Callable[[int, Mapping[str, float]], None]) -> None:
        """Hand what has arrived since to `record(steps, figures)`; the steps are those that were captioned after."""
        while not self._arrived.empty():
            record(*self._arrived.get())

    def finish(self, record: Callable[[int, Mapping[str, float]], None]) -> None:
        """Wait for what is still judged, but no longer than `wait_seconds`; the rest is left to a run that goes on."""
        deadline = time.monotonic() + self.config.wait_seconds
        while any(thread.is_alive() for thread in self._judging) and time.monotonic() < deadline:
            progress.mark()
            time.sleep(0.2)
        if waiting := [thread.name for thread in self._judging if thread.is_alive()]:
            log.warning("not judged within benchmarks.wait_seconds: %s; start the run again for it", ", ".join(waiting))
        self.report(record)

    def _captions(self, benchmark: Benchmark, engine: RolloutEngine, keys: Sequence[str]) -> list[str | None]:
        """This engine's share, greedily; None for the pictures that no caption could be made of."""
        captions: list[str | None] = []
        for start in range(0, len(keys), AT_ONCE):
            batch = keys[start : start + AT_ONCE]
            try:
                requests = [RolloutRequest(i, self._record(benchmark, key), i) for i, key in enumerate(batch)]
                captions += [group.rollouts[0].text.strip() for group in engine.greedy(requests)]
            except Exception as error:  # training goes on, whatever it was
                engine.reset_caches()
                if isinstance(error, UserError) and len(batch) > 1:  # one picture that does not fit: not the others'
                    captions += [self._captions(benchmark, engine, [key])[0] for key in batch]
                    continue
                log.warning("%s: no caption of %s: %s", benchmark.name, ", ".join(batch), error)
                captions += [None] * len(batch)
        return captions

    def _record(self, benchmark: Benchmark, key: str) -> CaptionRecord:
        picture = benchmark.pictures.read(benchmark.names[key])
        if self.max_pixels is not None:
            picture = shrink(picture, self.max_pixels)
        return CaptionRecord(key, picture, self.config.prompt, reference="")

    def _judge(self, benchmark: Benchmark, steps: int, captions: dict[str, str]) -> None:
        """Begin to judge on a thread of its own, which an end of the process does not wait for."""

        def work() -> None:
            try:
                folder = self.folder / f"step_{steps:06d}"
                write_json(folder / f"{benchmark.name}_captions.json", captions)
                figures = benchmark.score(captions, folder, self.endpoint)
                write_json(folder / f"{benchmark.name}_figures.json", figures)
                self._arrived.put((steps, figures))
            except Exception as error:  # training goes on, whatever it was
                log.warning("%s after step %d has no score: %s", benchmark.name, steps, error)
                self._arrived.put((steps, {f"benchmark/{benchmark.name}_judged": 0.0}))

        thread = threading.Thread(target=work, name=f"{benchmark.name} after step {steps}", daemon=True)
        self._judging = [*filter(threading.Thread.is_alive, self._judging), thread]
        thread.start()


def _read(config: BenchmarkConfig) -> dict[str, Benchmark]:
    """The benchmarks that the configuration names, their pictures looked at."""
    found = {}
    if config.captionqa is not None:
        rows = captionqa_questions.read_questions(config.captionqa.questions)
        root = Path(config.captionqa.images)
        names = captionqa_questions.pictures_by_id(rows, root)
        of = len(captionqa_questions.plan(rows, {str(row.get("id")): "" for row in rows}))
        tokens = config.captionqa.max_tokens
        found["captionqa"] = Benchmark(
            "captionqa", Pictures.look_at(root, names.values()), names,
            lambda captions, folder, endpoint: _score_captionqa(rows, of, captions, folder, endpoint, tokens),
        )  # fmt: skip
    if config.dcscore is not None:
        annotations = dcscore.read_annotations(config.dcscore.annotations)
        pictures = Pictures.look_at(Path(config.dcscore.images), annotations)
        names = {name: name for name, row in annotations.items() if row.get("oracle_caption")}
        found["dcscore"] = Benchmark(
            "dcscore", pictures, names,
            lambda captions, folder, endpoint: _score_dcscore(annotations, pictures, captions, folder, endpoint),
        )  # fmt: skip
    for benchmark in found.values():
        for name, why in benchmark.pictures.unusable.items():
            log.warning("%s: %r is left out: %s", benchmark.name, name, why)
    return found


def _scored_elsewhere(*_: Any) -> Figures:
    raise RuntimeError("only the first rank judges")


def _score_captionqa(
    rows: list, of: int, captions: dict[str, str], folder: Path, endpoint: JudgeEndpoint, max_tokens: int
) -> Figures:
    """of: the number of questions, those about pictures without a caption too."""
    questions, output = captionqa_questions.plan(rows, captions), folder / "captionqa.json"
    claim(output, {"captions": digest(captions), "questions": digest(rows), "tokens": max_tokens, **of_judge(endpoint)})
    run = captionqa.CaptionQaRun(questions, captions, output, max_tokens=max_tokens)
    coverage = Coverage(len(questions), asyncio.run(_with_client(endpoint, run.run)))
    _refuse_nothing(coverage)
    figures, _ = captionqa.summarize(output, questions)
    return {"benchmark/captionqa": figures["score"], "benchmark/captionqa_judged": coverage.judged / of}


def _score_dcscore(
    annotations: dict, pictures: Pictures, captions: dict[str, str], folder: Path, endpoint: JudgeEndpoint
) -> Figures:
    rows = [
        {"image_path": name, "caption": caption, "oracle_caption": annotations[name]["oracle_caption"]}
        for name, caption in captions.items()
    ]
    output = folder / "dcscore"
    parts = {"captions": digest(rows), "annotations": digest(annotations), **of_judge(endpoint)}
    claim(output, parts, pictures.digests)
    run = dcscore.DcScoreRun(rows, annotations, pictures, output)
    coverage = Coverage(len(rows), asyncio.run(_with_client(endpoint, run.run)))
    _refuse_nothing(coverage)
    figures = dcscore.summarize(output, False, len(rows))
    return {"benchmark/dcscore": figures["dcscore"], "benchmark/dcscore_judged": coverage.judged / len(annotations)}


async def _with_client(endpoint: JudgeEndpoint, run: Callable) -> dict[str, int]:
    client = ChatClient(endpoint)
    try:
        return await run(client)
    finally:
        await client.close()


def _refuse_nothing(coverage: Coverage) -> None:
    if not coverage.judged:
        raise RuntimeError(str(coverage))
