"""What a picture costs the host, and how much of that a step hides.

    python benchmarks/images.py [--quick] [--json FILE] [--config configs/qwen2_5_vl_7b.yaml] [--nodes 1] [--rate 1]
        [--only-hidden]

Pictures are drawn "photographs": gradients, shapes and a camera's noise, as JPEG files.
- Milliseconds of CPU time a picture for decoding, shrinking to `--max-pixels` and the checkpoint's own processor, by
  size and by decoder (PIL, DALI).
- Pictures a second through the threads that a run has (`training.ahead`), by number of threads and decoder.
- Of a step of the recipe as the planner predicts it, with `rollout.ahead` 0 and 1, the share of a rank's work on
  pictures that the step hides: one rank's share of the prompts, prepared by the run's own code (`training.prompts`),
  while the place of device work is taken by waiting for as long. `--rate 0.25` gives it a quarter of the pictures, for
  a machine without the cores; `--quick` shortens step and pictures alike.
- How much slower Python runs beside those threads, which the thread that launches kernels does as well.

The processor is Qwen2.5-VL's, of a tiny checkpoint: what it does depends on the picture and not on the model's size.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from balcap_mega.config.load import load_config
from balcap_mega.config.schema import DataConfig, RunConfig
from balcap_mega.data.files import ImageFileDataset, ImageRow
from balcap_mega.data.images import DaliDecoder, ImageDecoder, PilDecoder, shrink
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.sources import DALI_TOGETHER
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.planning.hardware import Cluster
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.plan import Plan, Planner
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.requests import RenderedPrompt
from balcap_mega.training.prompts import Pictures, Prompts

ROOT = Path(__file__).resolve().parents[1]
MEGAPIXELS = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)
THREADS = (1, 2, 4, 8)
STEP_MEGAPIXELS = 2.0
STEPS = 5  # of which the first two have more to sample
PROMPT = "Describe the picture."
DECODERS: dict[str, Callable[[int], ImageDecoder]] = {
    "pil": lambda threads: PilDecoder(),
    "dali": lambda threads: DaliDecoder(threads=threads),
}


def photograph(megapixels: float, seed: int) -> bytes:
    """A JPEG file of 4:3: light that falls off, a dozen shapes, noise as of a small sensor."""
    random = np.random.default_rng(seed)
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(height * 4 / 3)
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    light = np.stack([rows * random.random() + columns * random.random() for _ in range(3)], axis=-1)
    picture = Image.fromarray((110 * light + 40).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, size = random.random() * width, random.random() * height, random.random() * height / 3
        draw.ellipse((x, y, x + size, y + size / 2), fill=tuple(random.integers(0, 255, 3).tolist()))
    noise = random.normal(0, 6, (height, width, 3))
    picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def milliseconds(repeats: int, work: Callable[..., object], *arguments: object) -> float:
    """Of CPU time, of all threads: what else a machine does does not count."""
    work(*arguments)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work(*arguments)
        seconds.append(time.process_time() - start)
    return 1000 * median(seconds)


def stages(processor: PromptProcessor, max_pixels: int, repeats: int) -> list[dict[str, float | str]]:
    """Milliseconds of CPU time a picture."""
    rows = []
    for megapixels in MEGAPIXELS:
        data = photograph(megapixels, 0)
        [picture] = PilDecoder()([data])
        small = shrink(picture, max_pixels)
        row = {"megapixels": megapixels, "file_mib": len(data) / 2**20}
        for name, decoder in DECODERS.items():
            together = 1 if name == "pil" else DALI_TOGETHER
            row[f"decode_{name}"] = milliseconds(repeats, decoder(1), [data] * together) / together
        row["shrink"] = milliseconds(repeats, shrink, picture, max_pixels)
        row["process"] = milliseconds(repeats, processor, CaptionRecord("0", small, PROMPT, ""))
        rows.append(row)
    return rows


def dataset_of(folder: Path, count: int, max_pixels: int, decoder: str, threads: int) -> ImageFileDataset:
    """Of that many photographs; a few different ones, as what they cost does not hang on what they show."""
    names = []
    for number in range(min(count, 8)):
        names.append(f"{number}.jpg")
        (folder / names[-1]).write_bytes(photograph(STEP_MEGAPIXELS, number))
    rows = [ImageRow(str(n), names[n % len(names)], PROMPT, "") for n in range(count)]
    together = 1 if decoder == "pil" else DALI_TOGETHER
    return ImageFileDataset(rows, folder, decode=DECODERS[decoder](threads), max_pixels=max_pixels, together=together)


def rates(processor: PromptProcessor, max_pixels: int, count: int) -> list[dict[str, float | str]]:
    """Pictures a second, read to processed, by decoder and threads."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for decoder in DECODERS:
            for threads in THREADS:
                dataset = dataset_of(Path(folder), count, max_pixels, decoder, threads)
                prompts = Prompts(dataset, range(count), Pictures.of(DataConfig(threads=threads, ahead_gib=16)))
                start = time.perf_counter()
                prompts.prepare_pictures(range(count), processor)
                for place in range(count):
                    prompts.processed(place, processor)
                rows.append({"decoder": decoder, "threads": threads, "rate": count / (time.perf_counter() - start)})
    return rows


@dataclass(frozen=True)
class Share:
    """What one rank does in a step of the plan, or in a part of such a step.

    rollout, rest: seconds of device work, while captions are sampled and after that
    requests:      pictures that its engine is asked about
    pictures:      those that its learner encodes
    """

    rollout: float
    rest: float
    requests: int
    pictures: int

    @classmethod
    def of(cls, config: RunConfig, plan: Plan, gpus: int, part: float, rate: float) -> "Share":
        prompts, rollout = config.rollout.prompts_per_step, plan.seconds["rollout"]
        engines, learners = gpus // config.rollout.tensor_parallel, plan.data_size * config.parallel.tensor
        return cls(
            part * rollout,
            part * (plan.own_seconds - rollout),
            max(round(rate * part * prompts / engines), 1),
            max(round(rate * part * prompts / learners), 1),
        )

    def waited(self, dataset: ImageFileDataset, processor: PromptProcessor, pictures: Pictures, ahead: int) -> float:
        """Seconds that a step waits for pictures, once steps have settled; asked for as `training.trainer` does."""
        rendering, waits = threading.Lock(), [0.0] * STEPS

        def render(index: int, record: CaptionRecord) -> RenderedPrompt:
            with rendering:
                prompt = processor(record)
            return RenderedPrompt(prompt, len(prompt.prompt_token_ids), prompt.nbytes)

        def timed(step: int, work: Iterable[object]) -> None:
            start = time.perf_counter()
            for _ in work:
                pass
            waits[step] += time.perf_counter() - start

        each_step = self.requests + self.pictures  # none of which are the same, as on a rank of many
        starts = [each_step * step for step in range(STEPS + 2)]
        engine = [Prompts(dataset, range(start, start + self.requests), pictures) for start in starts]
        learner = [Prompts(dataset, range(start + self.requests, start + each_step), pictures) for start in starts]
        mine, everything = range(self.pictures), Replica(0, 1, 0)
        sampled = -1
        for step in range(STEPS):
            due = range(sampled + 1, step + ahead + 1)
            for each in due:
                timed(step, engine[each].of(everything, render))
                time.sleep(self.rollout)
                sampled = each
            if pictures.ahead.threads:
                for each in due:
                    learner[each].prepare_pictures(mine, processor, (each, 1))
                engine[sampled + 1].prepare_requests(everything, render, (sampled + 1 - ahead, 0))
            timed(step, (learner[step].processed(place, processor) for place in mine))
            time.sleep(self.rest)
        engine[sampled + 1].close()
        return fmean(waits[2:])


def hidden(processor: PromptProcessor, options: argparse.Namespace) -> list[dict[str, float | str]]:
    """Of the seconds that a step's pictures take a rank that prepares none, the share that it does not wait for."""
    config = load_config(options.config, ["data.max_pixels=1003520"])
    cluster, rows = Cluster(options.nodes), []
    for ahead in (1, 0):
        planner = Planner.of(config, cluster).with_ahead(ahead)
        plan, part = planner.plan(Layout.of(config)), 1 / 8 if options.quick else 1.0
        share = Share.of(config, plan, cluster.gpus, part, options.rate)
        for decoder in DECODERS if ahead and not options.quick else ("pil",):
            with tempfile.TemporaryDirectory() as folder:
                count = (STEPS + 2) * (share.requests + share.pictures)
                dataset = dataset_of(Path(folder), count, config.data.max_pixels, decoder, config.data.threads)
                found = {}
                for threads in (0, config.data.threads):
                    data = config.data.model_copy(update={"threads": threads})
                    quick = replace(share, rollout=0.0, rest=0.0) if threads == 0 else share
                    found[threads] = quick.waited(dataset, processor, Pictures.of(data), ahead)
            work, waited = found.values()
            rows.append(
                {"ahead": ahead, "decoder": decoder, "step": share.rollout + share.rest, "requests": share.requests,
                 "pictures": share.pictures, "work": work, "waited": waited, "hidden": 1 - waited / work}
            )  # fmt: skip
    return rows


def beside(processor: PromptProcessor, max_pixels: int, seconds: float) -> list[dict[str, float]]:
    """How fast a Python loop runs beside threads that prepare pictures, over how fast it runs alone."""

    def loops() -> int:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            count += 1
        return count

    alone, rows = loops(), []
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 4):
            dataset = dataset_of(Path(folder), 1000, max_pixels, "pil", threads)
            pictures = Pictures.of(DataConfig(threads=threads, ahead_gib=128))
            prompts = Prompts(dataset, range(1000), pictures)
            prompts.prepare_pictures(range(1000), processor)
            rows.append({"threads": threads, "speed": loops() / alone})
            prompts.close()
            pictures.ahead.close()
    return rows


def show(console: Console, title: str, rows: Sequence[Mapping[str, float | str]]) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="an eighth of a step, fewer repeats: under two minutes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "qwen2_5_vl_7b.yaml")
    parser.add_argument("--family", choices=FAMILIES, default=next(iter(FAMILIES)), help="whose processor")
    parser.add_argument("--rate", type=float, default=1.0, help="of a rank's pictures")
    parser.add_argument("--only-hidden", action="store_true", help="the share that a step hides, and nothing else")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--max-pixels", type=int, default=1003520)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        processor = PromptProcessor(write_tiny_checkpoint(folder, options.family, [PROMPT]))
        count = 16 if options.quick else 96
        results = {"of a step's work on pictures, a rank": hidden(processor, options)}
        if not options.only_hidden:
            results |= {
                "milliseconds of CPU time a picture": stages(processor, options.max_pixels, 3 if options.quick else 9),
                f"pictures of {STEP_MEGAPIXELS:g} megapixels a second": rates(processor, options.max_pixels, count),
                "a Python loop beside it, over alone": beside(processor, options.max_pixels, 1 if options.quick else 3),
            }
    machine = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("pillow", "nvidia-dali-cuda130", "transformers")},
    }
    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for title, rows in results.items():
        show(console, title, rows)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
