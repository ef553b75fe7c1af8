"""Time a refit of a real-size random policy: seconds and GB/s by phase, beside this machine's own copy bandwidth.

    python benchmarks/refit.py [--model 3b|7b|32b|72b] [--gib 1.5] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/refit.py --pipeline 2 --engine-tensor 1

The model has the widths and vocabulary of Qwen2.5-VL and as many layers as fit `--gib` of weights. On a CPU `finalise`
is vLLM's packing of linears for its kernels.
"""

import argparse
import json
import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from balcap_mega.config.schema import ModelConfig, ParallelConfig, RolloutConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface_tensors import huggingface_shapes
from balcap_mega.models.policy import build_policy
from balcap_mega.models.tiny import write_tiny_checkpoint
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit
from balcap_mega.rollout.refit.transfer import RefitReport

VOCABULARY = 152064
WIDTHS = {
    # hidden, intermediate, heads, key/value heads, layers, tied embeddings
    "3b": (2048, 11008, 16, 2, 36, True),
    "7b": (3584, 18944, 28, 4, 28, False),
    "32b": (5120, 27648, 40, 8, 64, False),
    "72b": (8192, 29568, 64, 8, 80, False),
}


def write_checkpoint(folder: Path, model: str, gib: float) -> Architecture:
    """A random bfloat16 checkpoint of `model`'s widths with as many layers as fit `gib`, at least one."""
    hidden, intermediate, heads, kv_heads, layers, tied = WIDTHS[model]
    head_dim = hidden // heads
    layer = hidden * (2 * hidden + 2 * kv_heads * head_dim + 3 * intermediate)
    embeddings = VOCABULARY * hidden * (1 if tied else 2)
    layers = min(max(int((gib * 2**30 / 2 - embeddings) // layer), 1), layers)
    text = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    # The small checkpoint brings tokenizer and processor; its weights give way to those of the real widths.
    write_tiny_checkpoint(folder, "qwen2_5_vl", ["A red circle."], tie_word_embeddings=tied)
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


def copy_bandwidth(device: torch.device, gib: float = 0.5, repeats: int = 5) -> float:
    """Bytes a second of a plain `copy_` between two tensors of `gib`, the best of some."""
    source = torch.ones(int(gib * 2**30 / 2), dtype=torch.bfloat16, device=device)
    target = torch.zeros_like(source)
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return source.nbytes / best


def summary(report: RefitReport, bandwidth: float) -> dict:
    """`report` with GB/s of each phase over the bytes written, and the transfer as a fraction of a plain copy."""
    written = report.local_bytes + report.received_bytes
    rates = {phase: written / seconds / 1e9 for phase, seconds in report.seconds.items() if seconds > 1e-3}
    return asdict(report) | {
        "written_bytes": written,
        "gigabytes_per_second": rates,
        "copy_gigabytes_per_second": bandwidth / 1e9,
        "transfer_fraction_of_copy": written / report.seconds["transfer"] / bandwidth,
        "total_seconds": sum(report.seconds.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WIDTHS, default="3b")
    parser.add_argument("--gib", type=float, default=1.5, help="weights of the language model, in bfloat16")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--engine-tensor", type=int, default=1)
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

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
    bandwidth = copy_bandwidth(platform.device)
    reports = []
    for _ in range(args.repeats):
        engine.sleep()
        reports.append(refit.run())
    best = summary(min(reports, key=lambda report: report.seconds["transfer"]), bandwidth)
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
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
