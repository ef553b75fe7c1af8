"""Time reading and writing a real-size checkpoint, with each rank's peak host memory beyond what it holds already.

    python benchmarks/checkpoint_io.py [--model 3b|7b|32b|72b] [--gib 2] [--shard-mib 512]
    torchrun --nproc-per-node 2 benchmarks/checkpoint_io.py --tensor 2
    torchrun --nproc-per-node 2 benchmarks/checkpoint_io.py --resumable --gib 0.2 --vocabulary 8192

The weights are random, with the widths of Qwen2.5-VL and as many layers as fit `--gib`. By default a policy is read
from its Hugging Face folder and exported again. `--resumable` takes a checkpoint of policy and optimizer and loads it,
in shares and, before that, as Megatron-Core gathers the optimizer: on one data-parallel rank when saving, whole on each
of them when loading.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from refit import VOCABULARY, write_checkpoint

from balcap_mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.transfer import export_checkpoint, import_checkpoint
from balcap_mega.models.policy import VisionLanguagePolicy, build_policy
from balcap_mega.parallel.gradients import build_optimizer, wrap_ddp
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.training.checkpoint.format import load_checkpoint
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from tests.support.checkpoints import gathered_state, gathering


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: what it has allocated and touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def measure(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds, and how much anonymous memory rose at most, sampled every 2 ms."""
    start_bytes = peak = anonymous_bytes()
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    return seconds, peak - start_bytes


def exporting(
    policy: VisionLanguagePolicy, source: Path, target: Path, shard_bytes: int
) -> dict[str, tuple[float, int]]:
    """Seconds and host memory of the Hugging Face folder's way in and out."""
    return {
        "import": measure(lambda: import_checkpoint(source, policy)),
        "export": measure(lambda: export_checkpoint(policy, source, target, shard_bytes=shard_bytes)),
    }


def resumable(
    policy: VisionLanguagePolicy, parallel: ParallelConfig, platform: Platform, target: Path
) -> dict[str, tuple[float, int]]:
    """Seconds and host memory of a resumable checkpoint: while training waits, until it is whole, and to load it."""
    results = {}
    with platform.megatron():
        model = wrap_ddp(policy, parallel)
        optimizer = build_optimizer(model, OptimizerConfig(), parallel)
        model.zero_grad_buffer()
        optimizer.step()
    for name, way in (("gathered", gathering), ("in shares", nullcontext)):
        writer = CheckpointWriter(target / name, platform, keep=1, timeout_seconds=600)
        torch.distributed.barrier()
        with way():
            results[f"{name}: snapshot"] = measure(partial(writer.start, 1, model, optimizer, {}))
        results[f"{name}: files"] = measure(writer.finish)
    path = target / "gathered" / "step_000001"
    torch.distributed.barrier()
    with platform.megatron():
        results["gathered: load"] = measure(
            lambda: dist_checkpointing.load(
                gathered_state(model, optimizer, is_loading=True)[0], str(path / "megatron")
            )
        )
    torch.distributed.barrier()
    with platform.megatron():
        path = target / "in shares" / "step_000001"
        results["in shares: load"] = measure(lambda: load_checkpoint(path, model, optimizer))
    return results


def ratios(ranks: list[dict[str, tuple[float, int]]]) -> Iterator[str]:
    """What gathering takes for one of shares: seconds of the slowest rank, memory of the fullest."""
    worst = {name: tuple(max(rank[name][part] for rank in ranks) for part in (0, 1)) for name in ranks[0]}
    for what in ("snapshot", "files", "load"):
        before, after = worst[f"gathered: {what}"], worst[f"in shares: {what}"]
        memory = f", {before[1] / max(after[1], 1):.1f} times the host memory" if before[1] > 2**20 else ""
        yield f"gathered over in shares, {what}: {before[0] / after[0]:.1f} times the seconds{memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("3b", "7b", "32b", "72b"), default="3b")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--resumable", action="store_true")
    options = parser.parse_args()

    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    platform = Platform.resolve("auto")
    layout = initialize_parallel(parallel, platform)
    rank = torch.distributed.get_rank()
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        torch.distributed.broadcast_object_list(shared, src=0)
        source, target = Path(shared[0]) / "source", Path(shared[0]) / "exported"
        if rank == 0:
            write_checkpoint(source, options.model, options.gib, options.vocabulary)
        torch.distributed.barrier()
        policy = build_policy(Architecture.from_folder(source), ModelConfig(path=str(source)), parallel, platform)
        for parameter in policy.parameters():
            parameter.data.zero_()  # touched now, so that what follows is only what reading itself takes
        held = sum(parameter.nbytes for parameter in policy.parameters())
        if options.resumable:
            import_checkpoint(source, policy)
            results = resumable(policy, parallel, platform, target)
        else:
            results = exporting(policy, source, target, options.shard_mib * 2**20)
        torch.distributed.barrier()
        total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        lines = [
            f"rank {rank} (tensor {layout.tensor_rank}, pipeline {layout.pipeline_rank}) {what}: {seconds:.2f} s, "
            f"{held / 2**20:.0f} MiB of parameters, at most {extra / 2**20:.0f} MiB more on the host"
            for what, (seconds, extra) in results.items()
        ]
        everyone: list[tuple[list[str], dict]] = [([], {})] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (lines, results))
        if rank == 0:
            kind = "two checkpoints" if options.resumable else "checkpoint"
            print(f"{kind} of {total / 2**30:.2f} GiB", *(line for part, _ in everyone for line in part), sep="\n")
            if options.resumable:
                print(*ratios([found for _, found in everyone]), sep="\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
