"""Time reading and writing a real-size checkpoint, with each rank's peak host memory beyond its parameters.

    python benchmarks/checkpoint_io.py [--model 3b|7b|32b|72b] [--gib 2] [--shard-mib 512]
    torchrun --nproc-per-node 2 benchmarks/checkpoint_io.py --tensor 2

The weights are random, with the widths and vocabulary of Qwen2.5-VL and as many layers as fit `--gib`.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from refit import write_checkpoint

from balcap_mega.config.schema import ModelConfig, ParallelConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.transfer import export_checkpoint, import_checkpoint
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("3b", "7b", "32b", "72b"), default="3b")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
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
            write_checkpoint(source, options.model, options.gib)
        torch.distributed.barrier()
        policy = build_policy(Architecture.from_folder(source), ModelConfig(path=str(source)), parallel, platform)
        for parameter in policy.parameters():
            parameter.data.zero_()  # touched now, so that what follows is only what reading itself takes
        held = sum(parameter.nbytes for parameter in policy.parameters())
        results = {
            "import": measure(lambda: import_checkpoint(source, policy)),
            "export": measure(lambda: export_checkpoint(policy, source, target, shard_bytes=options.shard_mib * 2**20)),
        }
        total = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        lines = [
            f"rank {rank} (tensor {layout.tensor_rank}, pipeline {layout.pipeline_rank}) {what}: {seconds:.2f} s, "
            f"{held / 2**20:.0f} MiB of parameters, at most {extra / 2**20:.0f} MiB more on the host"
            for what, (seconds, extra) in results.items()
        ]
        gathered: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, lines)
        if rank == 0:
            print(f"checkpoint of {total / 2**30:.2f} GiB", *(line for part in gathered for line in part), sep="\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
