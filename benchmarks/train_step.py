"""Time the policy update with each prefix once, against a copy of the prefix for every caption; then a whole step.

    python benchmarks/train_step.py [--json FILE] [--cases grid step trl]

grid  packing and one optimizer step on the same rollouts, shared and unshared: trained tokens, FLOPs, wall time and
      memory; image tokens 64, 576 and 1,280, G = 1, 4, 8 and 16; Qwen2.5-VL of 4 layers x 256, float32, two images.
step  rollouts by vLLM, then the update, shared and unshared: LLaVA of 4 layers x 256, 576 image tokens, float32.
trl   the same as `step` by TRL's GRPOTrainer on the same checkpoint, in a process of its own (needs `trl`).

`step` and `trl` take 8 images, G = 8 and captions of 175 tokens unless told otherwise (--images, --group,
--caption-tokens). Run it on an idle machine: two threads that wait for each other suffer most from a third.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
    RolloutConfig,
)
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.attention_backends.pattern import attention_pattern
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.models.released import RELEASED
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.parallel.groups import initialize_parallel, process_grid
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.batches import BatchBuilder
from balcap_mega.training.learner import Learner
from balcap_mega.training.microbatch import Microbatch
from balcap_mega.training.prompts import Prompts

PROMPT = "Describe the image."
TEXTS = (
    "A large red circle is to the left of a small blue square.",
    "There are two green triangles above a star.",
) * 20
DECODER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
SIDES = {64: (8, 8), 576: (24, 24), 1280: (32, 40)}  # rows and columns of image tokens
GROUPS = (1, 4, 8, 16)


def write_model(folder: Path, released: str, **overrides: dict) -> Path:
    """A small model of the family of that released checkpoint."""
    return write_tiny_checkpoint(folder, RELEASED[released]["model_type"], TEXTS, **overrides)


def write_grid_model(folder: Path) -> Path:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    return write_model(folder, "Qwen2.5-VL-3B", text_config=DECODER | {"rope_parameters": rope})


def write_step_model(folder: Path) -> Path:
    return write_model(folder, "LLaVA-1.5-7B", text_config=DECODER, vision_config={"image_size": 336})


def records(count: int, height: int, width: int) -> list[CaptionRecord]:
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
    return [CaptionRecord(str(index), image, PROMPT, reference="") for index, image in enumerate(images)]


def random_rollouts(
    processor: PromptProcessor, examples: Sequence[CaptionRecord], group: int, caption_tokens: int
) -> list[RolloutGroup]:
    """Captions of random tokens; the update does not care what they say."""
    noise = np.random.default_rng(1)

    def caption() -> Rollout:
        tokens = noise.integers(10, 250, caption_tokens).tolist()
        return Rollout(tuple(tokens), (-5.0,) * caption_tokens, text="", finished=True)

    return [
        RolloutGroup(
            index,
            processor(record).prompt_token_ids,
            tuple(caption() for _ in range(group)),
            SeenRecord.of(index, record),
        )
        for index, record in enumerate(examples)
    ]


@dataclass
class Bench:
    """A policy to update, and what turns rollouts into its microbatches."""

    learner: Learner
    processor: PromptProcessor

    @classmethod
    def of(cls, folder: Path) -> "Bench":
        parallel = ParallelConfig(distributed_optimizer=False)
        learner = Learner(
            folder,
            ModelConfig(path=str(folder), dtype="float32"),
            parallel,
            OptimizerConfig(learning_rate=1e-6),
            AlgorithmConfig(),
            Platform.resolve("auto"),
        )
        return cls(learner, PromptProcessor(folder))

    def microbatches(self, examples, groups: Sequence[RolloutGroup], *, shared: bool) -> tuple[Microbatch, ...]:
        packing = PackingConfig(row_tokens=4096, shared_prefix=shared)
        hidden_size = self.learner.architecture.hidden_size
        builder = BatchBuilder(self.processor, packing, process_grid(), hidden_size=hidden_size, pad_to=1)
        count = sum(len(group.rollouts) for group in groups)
        values = torch.randn(count, generator=torch.Generator().manual_seed(2))
        advantages = Advantages(values, values[None], torch.zeros(count, dtype=torch.bool))
        prompts = Prompts(examples, range(len(examples)))
        return builder.from_rollouts(prompts, groups, advantages, updates=1).minibatches[0]

    def compare(self, examples, groups: Sequence[RolloutGroup], repeats: int) -> dict[str, float]:
        """Packing and update, shared and unshared in turn, so that a busy machine slows both; the fastest counts."""
        names = ("unshared", "shared")
        self.learner.update(self.microbatches(examples[:1], groups[:1], shared=True))  # the optimizer's state is there
        result: dict[str, float] = {}
        for name in names:
            batch = self.microbatches(examples, groups, shared=name == "shared")
            result[f"{name}_tokens"] = sum(len(microbatch.row.tokens) for microbatch in batch)
            result[f"{name}_gflops"], result[f"{name}_peak_mib"] = peak_mib(lambda batch=batch: self.gflops(batch))
        seconds = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                start = time.perf_counter()
                self.learner.update(self.microbatches(examples, groups, shared=name == "shared"))
                seconds[name].append(time.perf_counter() - start)
        result |= {f"{name}_seconds": round(min(taken), 3) for name, taken in seconds.items()}
        result["speedup"] = round(result["unshared_seconds"] / result["shared_seconds"], 2)
        return result

    def gflops(self, batch: Sequence[Microbatch]) -> float:
        """Of an update: matrix products as PyTorch counts them, and 14·d FLOPs a head and query-key pair.

        (Attention of the decoder: two products forward, five backward. That of the frozen vision tower is left out.)
        """
        with FlopCounterMode(display=False) as counter:
            self.learner.update(batch)
        decoder: Architecture = self.learner.architecture
        pairs = sum(attention_pattern(microbatch.row.segments).pairs() for microbatch in batch)
        attention = 14 * decoder.head_dim * decoder.num_attention_heads * decoder.num_layers * pairs
        return round((counter.get_total_flops() + attention) / 1e9, 1)


def peak_mib(run: Callable[[], float]) -> tuple[float, float]:
    """What `run` returns, and the memory that it takes on top of what is held before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the resident set's high-water mark
    before = _status_mib("VmRSS")
    return run(), round(_status_mib("VmHWM") - before, 1)


def _status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def run_grid(folder: Path, caption_tokens: int, repeats: int) -> list[dict[str, float]]:
    bench, results = Bench.of(write_grid_model(folder)), []
    for image_tokens, (rows, columns) in SIDES.items():
        examples = records(2, rows * 28, columns * 28)
        for group in GROUPS:
            groups = random_rollouts(bench.processor, examples, group, caption_tokens)
            setting = {"image_tokens": image_tokens, "prefix": len(groups[0].prompt_token_ids), "group": group}
            results.append(setting | bench.compare(examples, groups, repeats))
            print(f"measured {setting}", file=sys.stderr, flush=True)
    return results


def grid_table(results: Sequence[dict[str, float]]) -> str:
    """One line a setting: tokens, work, time and memory with a prefix for every caption, and with each prefix once."""
    heads = ("prefix", "G", "tokens", "shared", "GFLOP", "shared", "s", "shared", "MiB", "shared", "speed-up")
    lines = ["".join(f"{head:>10}" for head in heads)]
    for result in results:
        pairs = [
            f"{result[f'{name}_{column}']:>10,}"
            for column in ("tokens", "gflops", "seconds", "peak_mib")
            for name in ("unshared", "shared")
        ]
        lines.append(f"{result['prefix']:>10,}{result['group']:>10}{''.join(pairs)}{result['speedup']:>10}")
    return "\n".join(lines)


def run_step(folder: Path, images: int, group: int, caption_tokens: int, repeats: int) -> dict[str, float]:
    """vLLM's captions, then the update on them: what TRL's step is held against."""
    from balcap_mega.rollout.engine import RolloutEngine
    from balcap_mega.rollout.requests import RolloutRequest

    examples = records(images, 336, 336)
    bench = Bench.of(folder)
    config = RolloutConfig(prompts_per_step=images, group_size=group, max_tokens=caption_tokens, max_model_len=1024)
    platform = Platform.resolve("auto")
    engine = RolloutEngine(folder, config, device=platform.device, dtype=torch.float32, seed=0)
    engine.processor.banned_token_ids += engine.processor.eos_token_ids  # every caption runs to its limit
    prompts = [RolloutRequest(index, record, index) for index, record in enumerate(examples)]
    generation = []
    for step in range(repeats + 1):
        engine.reset_caches()  # as a refit does
        start = time.perf_counter()
        groups = engine.sample(prompts, step=step)
        generation.append(time.perf_counter() - start)
    assert all(len(rollout.token_ids) == caption_tokens for found in groups for rollout in found.rollouts)
    result = {"generation_seconds": round(min(generation), 3)} | bench.compare(examples, groups, repeats)
    step_seconds = result["generation_seconds"] + result["shared_seconds"]
    samples_per_second = round(images * group / step_seconds, 2)
    return result | {"step_seconds": round(step_seconds, 3), "samples_per_second": samples_per_second}


def run_trl(folder: Path, *sizes: int) -> dict[str, float]:
    command = [sys.executable, Path(__file__).with_name("trl_step.py"), folder, *map(str, sizes)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", nargs="+", choices=("grid", "step", "trl"), default=["grid", "step", "trl"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--caption-tokens", type=int, default=175)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    sizes = (arguments.images, arguments.group, arguments.caption_tokens)
    results = {"command": sys.argv, "torch": torch.__version__, "threads": torch.get_num_threads()}
    initialize_parallel(ParallelConfig(), Platform.resolve("auto"))
    with tempfile.TemporaryDirectory() as temporary:
        model = write_step_model(Path(temporary) / "step")
        if "grid" in arguments.cases:
            results["grid"] = run_grid(Path(temporary) / "grid", arguments.caption_tokens, arguments.repeats)
            print(grid_table(results["grid"]), flush=True)
        if "step" in arguments.cases:
            results["step"] = run_step(model, *sizes, arguments.repeats)
            print(json.dumps(results["step"]), flush=True)
        if "trl" in arguments.cases:
            results["trl"] = run_trl(model, *sizes, arguments.repeats)
            print(json.dumps(results["trl"]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
