"""Time a refit of a real-size random policy: seconds and GB/s by phase, beside this machine's own copy bandwidth.

    python benchmarks/refit.py [--model 3b|7b|32b|72b] [--gib 1.5] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/refit.py --pipeline 2 --engine-tensor 1
    python benchmarks/refit.py --all-layouts [--json FILE]      # every pair of layouts, one after the other

The model has the widths and vocabulary of Qwen2.5-VL and as many layers as fit `--gib` of weights. On a CPU `finalise`
is vLLM's packing of linears for its kernels. A transfer is held against a plain copy: the bytes that a rank writes,
against `copy_` of as many bytes by as many ranks at the same time; the slowest rank counts on either side.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from balcap_mega.config.schema import ModelConfig, ParallelConfig, RolloutConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.tensors import huggingface_shapes
from balcap_mega.models.policy import build_policy
from balcap_mega.models.released import RELEASED
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit
from balcap_mega.rollout.refit.refit import BUCKET_BYTES, RefitReport

VOCABULARY = 152064
LAYOUTS = (
    # ranks, Megatron TP and PP, vLLM TP
    (1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (4, 2, 2, 1),
    (2, 1, 1, 2), (2, 2, 1, 2), (2, 1, 2, 2), (4, 2, 2, 2),
)  # fmt: skip
FAMILY = RELEASED["Qwen2.5-VL-3B"]["model_type"]
WIDTHS = {
    # hidden, intermediate, heads, key/value heads, layers, tied embeddings
    "3b": (2048, 11008, 16, 2, 36, True),
    "7b": (3584, 18944, 28, 4, 28, False),
    "32b": (5120, 27648, 40, 8, 64, False),
    "72b": (8192, 29568, 64, 8, 80, False),
}


def write_checkpoint(folder: Path, model: str, gib: float, vocabulary: int = VOCABULARY) -> Architecture:
    """A random bfloat16 checkpoint of `model`'s widths with as many layers as fit `gib`, at least one."""
    hidden, intermediate, heads, kv_heads, layers, tied = WIDTHS[model]
    head_dim = hidden // heads
    layer = hidden * (2 * hidden + 2 * kv_heads * head_dim + 3 * intermediate)
    embeddings = vocabulary * hidden * (1 if tied else 2)
    layers = min(max(int((gib * 2**30 / 2 - embeddings) // layer), 1), layers)
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    # The small checkpoint brings tokenizer and processor; its weights give way to those of the real widths.
    write_tiny_checkpoint(folder, FAMILY, ["A red circle."], tie_word_embeddings=tied)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["text_config"] |= text | {"layer_types": ["full_attention"] * layers}
    config["vision_config"]["out_hidden_size"] = hidden
    path.write_text(json.dumps(config), encoding="utf-8")
    architecture = Architecture.from_folder(folder)
    weights = {
        name: torch.rand(shape, dtype=torch.bfloat16).mul_(0.02)
        for name, shape in huggingface_shapes(architecture).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return architecture


def copy_bandwidth(device: torch.device, source: Tensor, target: Tensor) -> float:
    """Bytes a second of a plain `copy_`, while every other rank does the same; the slowest rank's."""
    torch.distributed.barrier()
    start = time.perf_counter()
    target.copy_(source)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return source.nbytes / slowest(time.perf_counter() - start, device)


def slowest(seconds: float, device: torch.device) -> float:
    """The largest of all ranks' `seconds`, on every rank."""
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found.item()


def phases(seconds: dict[str, float], device: torch.device) -> dict[str, float]:
    """Each phase's seconds on the slowest rank; what a rank waits while another one packs layers is finalising too."""
    together = slowest(seconds["transfer"] + seconds["finalise"], device)
    found = {phase: slowest(taken, device) for phase, taken in seconds.items()}
    return found | {"transfer": together - found["finalise"]}


def summary(report: RefitReport, seconds: dict[str, float], bandwidth: float) -> dict:
    """`report` with GB/s of each phase over the bytes written, and the transfer as a fraction of a plain copy."""
    written = report.local_bytes + report.received_bytes
    rates = {phase: written / taken / 1e9 for phase, taken in seconds.items() if taken > 1e-3}
    return asdict(report) | {
        "seconds": seconds,
        "written_bytes": written,
        "gigabytes_per_second": rates,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "transfer_fraction_of_copy": written / seconds["transfer"] / bandwidth,
        "total_seconds": sum(seconds.values()),
    }


def run_all_layouts(args: argparse.Namespace) -> list[dict]:
    """One `torchrun` a pair of layouts; the results, printed as a table too."""
    results = []
    for ranks, tensor, pipeline, engine_tensor in LAYOUTS:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            command += [__file__, "--model", args.model, "--gib", str(args.gib), "--repeats", str(args.repeats)]
            command += ["--bucket-mib", str(args.bucket_mib), "--tensor", str(tensor), "--pipeline", str(pipeline)]
            command += ["--engine-tensor", str(engine_tensor), "--json", file.name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results.append(json.loads(Path(file.name).read_text(encoding="utf-8")))
        result = results[-1]
        print(
            f"Megatron TP{tensor} PP{pipeline} -> vLLM TP{engine_tensor}, {ranks} ranks: "
            f"{result['received_bytes'] / result['written_bytes']:4.0%} of the bytes from other ranks, transfer "
            f"{result['seconds']['transfer']:.3f} s, {result['transfer_fraction_of_copy']:4.0%} of a plain copy",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WIDTHS, default="3b")
    parser.add_argument("--gib", type=float, default=1.5, help="weights of the language model, in bfloat16")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--engine-tensor", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=BUCKET_BYTES // 2**20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--all-layouts", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = run_all_layouts(args) if args.all_layouts else run(args)
    if args.json and (args.all_layouts or torch.distributed.get_rank() == 0):
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> dict:
    """One pair of layouts, on the ranks that are there."""
    platform = Platform.resolve("auto")
    parallel = ParallelConfig(tensor=args.tensor, pipeline=args.pipeline)
    initialize_parallel(parallel, platform)
    with tempfile.TemporaryDirectory() as scratch:
        shared = [scratch]
        torch.distributed.broadcast_object_list(shared, device=platform.device)
        folder = Path(shared[0])
        if torch.distributed.get_rank() == 0:
            write_checkpoint(folder, args.model, args.gib)
        torch.distributed.barrier()
        architecture = Architecture.from_folder(folder)
        engine = RolloutEngine(
            folder,
            RolloutConfig(tensor_parallel=args.engine_tensor, max_model_len=512),
            device=platform.device,
            dtype=torch.bfloat16,
            seed=0,
            sleeps=True,
        )
        torch.distributed.barrier()
    policy = build_policy(architecture, ModelConfig(path=str(folder)), parallel, platform)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.uniform_(-0.02, 0.02)
    refit = build_refit(policy, engine, parallel, bucket_bytes=args.bucket_mib * 2**20)
    source = torch.ones(2**27, dtype=torch.bfloat16, device=platform.device)
    target = torch.zeros_like(source)
    bandwidths, times, reports = [], [], []
    for _ in range(args.repeats):  # in turn, so that a busy machine slows both
        bandwidths.append(copy_bandwidth(platform.device, source, target))
        engine.sleep()
        reports.append(refit.run())
        times.append(phases(reports[-1].seconds, platform.device))
    bandwidth = max(bandwidths)
    best = summary(reports[-1], min(times, key=lambda seconds: seconds["transfer"]), bandwidth)
    result = {
        "model": args.model,
        "layers": architecture.num_layers,
        "device": str(platform.device),
        "world_size": torch.distributed.get_world_size(),
        "megatron": {"tensor": args.tensor, "pipeline": args.pipeline},
        "engine_tensor": args.engine_tensor,
        "repeats": args.repeats,
        **best,
    }
    if torch.distributed.get_rank() == 0:
        print(f"{args.model} widths, {architecture.num_layers} layers, {best['written_bytes'] / 1e9:.2f} GB a rank")
        for phase, seconds in best["seconds"].items():
            rate = best["gigabytes_per_second"].get(phase)
            print(f"  {phase:<9} {seconds:8.4f} s" + (f"  {rate:7.2f} GB/s" if rate else ""))
        print(f"  plain copy_          {bandwidth / 1e9:7.2f} GB/s")
        print(f"  transfer / copy_     {best['transfer_fraction_of_copy']:7.0%}")
        print(f"  received {best['received_bytes'] / 1e9:.3f} GB, at least {best['lower_bound_bytes'] / 1e9:.3f} GB")
    return result


if __name__ == "__main__":
    main()
