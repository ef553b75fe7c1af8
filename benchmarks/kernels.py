"""Time each kernel against eager PyTorch, torch.compile, Liger-Kernel and TRL, where these are installed.

    python benchmarks/kernels.py [--device cuda|cpu] [--json FILE] [--ops OP ...] [--only NAME ...]

lm_head         hidden rows to the clipped loss, forward and backward; bound: three GEMMs of the same sizes, measured
logprobs        the same rows to logprobs, forward only; bound: one GEMM
reward_to_loss  rewards of 512 rollouts, of K components, and the logprobs of 64k tokens to the loss and its gradient;
                bound: its bytes at the measured copy bandwidth

Each case runs in a process of its own, under a time limit, and `--json` keeps it: a second call measures only what the
file lacks. On a CPU the same algorithms run in PyTorch, in float32 and at a smaller hidden size. Memory is the peak
beyond the inputs, gradients included. What computes less than the rest says so in `NOTES`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balcap_mega.algorithm import advantages, lm_head, logits, policy_loss
from balcap_mega.algorithm.batch import RewardBatch, TokenBatch
from balcap_mega.config.schema import AlgorithmConfig

CONFIG = AlgorithmConfig()
OPS = ("lm_head", "logprobs", "reward_to_loss")
NOTES = {
    "eager": "no entropy",
    "torch.compile": "no entropy",
    "liger": "cross-entropy of the targets, no clipped objective",
    "liger_grpo": "no importance weight",
}


@dataclass(frozen=True)
class Case:
    """rows tokens; for the head a hidden size and a vocabulary, for rewards a number of rollouts and of components."""

    op: str
    candidate: str
    device: str
    rows: int
    hidden: int = 0
    vocabulary: int = 0
    rollouts: int = 0
    components: int = 0

    @property
    def size(self) -> str:
        if self.op == "reward_to_loss":
            return f"K {self.components}, {self.rollouts:,} rollouts, {self.rows:,} tokens"
        return f"N {self.rows:,}, H {self.hidden:,}, V {self.vocabulary:,}"

    @property
    def flops(self) -> int:
        return {"lm_head": 6, "logprobs": 2, "reward_to_loss": 0}[self.op] * self.rows * self.hidden * self.vocabulary

    @property
    def bytes(self) -> int:
        """Compulsory traffic. A token: trainer's and engine's logprobs, entropy and sequence in, one derivative out. A
        rollout: two lengths and a group in, advantage and gate out, and for each component reward, validity, result.
        """
        tokens = self.rows * (3 * 4 + 8 + 4)
        return tokens + self.rollouts * (21 + 9 * self.components) if self.op == "reward_to_loss" else 0


def cases(device: str) -> list[Case]:
    found = []
    sizes = [(8192, 3584), (16384, 3584), (32768, 3584)] if device == "cuda" else [(8192, 128)]
    head = ("bound", "balcap", "eager", "torch.compile", "trl", "liger", "liger_grpo")
    for op, candidates in (("lm_head", head), ("logprobs", head[:5])):
        for rows, hidden in sizes:
            found += [Case(op, candidate, device, rows, hidden, 152_064) for candidate in candidates]
    found += [
        Case("reward_to_loss", name, device, 2**16, rollouts=512, components=components)
        for components in (1, 3, 4, 8)
        for name in ("bound", "balcap", "eager", "torch.compile")
    ]
    return found


# Candidates: each builds its inputs and returns what is timed.


def random_tokens(rows: int, vocabulary: int, sequences: int, device: str) -> TokenBatch:
    lengths = torch.full((sequences,), rows // sequences)
    ids = torch.repeat_interleave(torch.arange(sequences), lengths)
    old = -3 * torch.rand(rows)
    return TokenBatch(
        targets=torch.randint(max(vocabulary, 1), (rows,)),
        sequence_ids=ids,
        token_index=torch.arange(rows) % (rows // sequences),
        advantages=torch.randn(sequences),
        old_logprobs=old,
        rollout_logprobs=old + 0.01,
        reference_logprobs=None,
        sequence_lengths=lengths[ids].float(),
    ).to(torch.device(device))


def head_run(case: Case) -> Callable[[], object]:
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    hidden = torch.randn(case.rows, case.hidden, device=case.device, dtype=dtype)
    weight = torch.nn.Parameter(
        torch.randn(case.vocabulary, case.hidden, device=case.device, dtype=dtype) * case.hidden**-0.5
    )
    tokens = random_tokens(case.rows, case.vocabulary, 16, case.device)
    forward_only = case.op == "logprobs"
    if case.candidate == "bound":
        return gemms(hidden, weight.detach(), 1 if forward_only else 3)
    hidden.requires_grad_(not forward_only)
    forward = HEADS[case.candidate](weight, tokens, forward_only)

    def run():
        with torch.set_grad_enabled(not forward_only):
            result = forward(hidden)
        if not forward_only:
            assert isinstance(result, Tensor)
            result.backward()
            hidden.grad = weight.grad = None

    if case.candidate == "balcap" and not forward_only:  # as in training, where gradients accumulate in float32
        vars(weight).update(main_grad=torch.zeros_like(weight, dtype=torch.float32), grad_added_to_main_grad=False)
    return run


def balcap_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    head = lm_head.HeadShard(weight, weight.shape[0])
    if forward_only:
        return lambda hidden: lm_head.token_logprobs(hidden, tokens.targets, head)
    return lambda hidden: lm_head.fused_policy_loss(hidden, tokens, head, CONFIG).loss_sum


def eager_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    def forward(hidden: Tensor) -> Tensor:
        logprobs = F.log_softmax((hidden @ weight.t()).float(), dim=-1).gather(1, tokens.targets[:, None])[:, 0]
        return logprobs if forward_only else policy_loss.policy_loss(logprobs, tokens, CONFIG).loss_sum

    references_only()
    return forward


def compiled_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    return torch.compile(eager_head(weight, tokens, forward_only))


def trl_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def forward(hidden: Tensor) -> Tensor:
        logprobs = ChunkedLogProbFunction.apply(
            hidden, weight, None, tokens.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        )[0]
        return logprobs if forward_only else policy_loss.policy_loss(logprobs, tokens, CONFIG).loss_sum

    return forward


def liger_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports] (optional)
        liger_fused_linear_cross_entropy,
    )

    return lambda hidden: liger_fused_linear_cross_entropy(
        hidden, weight, tokens.targets, reduction="sum", accum_dtype=torch.float32
    )


def liger_grpo_head(weight: Tensor, tokens: TokenBatch, forward_only: bool) -> Callable[[Tensor], object]:
    from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports] (optional)
        LigerFusedLinearGRPOLoss,
    )

    sequences = int(tokens.sequence_ids.max()) + 1
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28)
    targets, old = (column.view(sequences, -1) for column in (tokens.targets, tokens.old_logprobs))
    mask = torch.ones_like(targets)

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.view(sequences, -1, hidden.shape[-1])
        return loss(rows, weight, targets, mask, tokens.advantages, old_per_token_logps=old)[0]

    return forward


HEADS = {
    "balcap": balcap_head, "eager": eager_head, "torch.compile": compiled_head, "trl": trl_head,
    "liger": liger_head, "liger_grpo": liger_grpo_head,
}  # fmt: skip


def rewards_run(case: Case) -> Callable[[], object]:
    if case.candidate == "bound":
        source = torch.empty(2**28 // (1 if case.device == "cuda" else 4), dtype=torch.uint8, device=case.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    count, names = case.rollouts, tuple(f"component_{k}" for k in range(case.components))
    rewards = RewardBatch(
        names=names,
        values=torch.rand(len(names), count),
        valid=torch.rand(len(names), count) > 0.05,
        lengths=torch.full((count,), 30.0),
        reference_lengths=torch.full((count,), 25.0),
        group_ids=torch.arange(count) // 8,
    ).to(torch.device(case.device))
    config = CONFIG.model_copy(update={"gate": CONFIG.gate.model_copy(update={"components": names[-1:]})})
    tokens = random_tokens(case.rows, 0, count, case.device)
    logprobs = tokens.old_logprobs + 0.1 * torch.randn_like(tokens.old_logprobs)
    # As in training: the step's first update is against its own logprobs, and so on the kernels' least traffic.
    tokens, entropy = replace(tokens, old_logprobs=None), torch.zeros_like(logprobs)

    def fused():
        scored = replace(tokens, advantages=advantages.compute_advantages(rewards, config).values)
        policy_loss.policy_loss_terms(logprobs, scored, config, entropy=entropy)

    def by_autograd(logprobs: Tensor) -> Tensor:
        scored = replace(tokens, advantages=advantages.compute_advantages(rewards, config).values)
        return policy_loss.policy_loss(logprobs, scored, config, entropy=entropy).loss_sum

    if case.candidate == "balcap":
        return fused
    references_only()
    function = torch.compile(by_autograd) if case.candidate == "torch.compile" else by_autograd
    logprobs.requires_grad_()
    return lambda: torch.autograd.grad(function(logprobs), logprobs)


def references_only() -> None:
    """This process compares against the plain PyTorch references: no dispatch to Triton."""
    for module in (advantages, logits, policy_loss):
        vars(module)["use_kernels"] = lambda tensor: False


def gemms(hidden: Tensor, weight: Tensor, count: int) -> Callable[[], object]:
    """The head's own GEMMs and nothing else: logits, d hidden, d weight into float32."""
    chunk = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)

    def run():
        torch.mm(hidden, weight.t(), out=chunk)
        if count == 3:
            torch.mm(chunk, weight, out=d_hidden)
            lm_head.accumulate_(d_weight, chunk, hidden)

    return run


# Measuring


def measure(case: Case) -> dict:
    """Seconds (median of repeats, best of two on a CPU) and peak bytes beyond the inputs, on this process's device."""
    torch.manual_seed(0)
    if case.candidate == "bound" and case.device == "cpu" and case.hidden:  # its logits at once would not fit
        case = Case(**{**asdict(case), "rows": 1024})
    run = (rewards_run if case.op == "reward_to_loss" else head_run)(case)
    if case.device == "cuda":
        from triton.testing import do_bench

        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        milliseconds: Any = do_bench(run, warmup=200, rep=1000, return_mode="median")
        return {"seconds": milliseconds / 1e3, "peak_bytes": peak}
    if case.candidate == "torch.compile" or case.op == "reward_to_loss":
        run()  # compilation is not what is timed
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    times = []
    for _ in range(2 if case.hidden else 20):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "peak_bytes": max(memory("VmHWM") - before, 0)}


def memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def run_case(case: Case, limit: int) -> dict:
    """Measure in a fresh process; what fails becomes a row that says why."""
    if case.candidate.startswith("liger") and find_spec("liger_kernel") is None:
        return {"missing": "liger_kernel is not installed"}
    if case.candidate == "trl" and find_spec("trl") is None:
        return {"missing": "trl is not installed"}
    if case.candidate == "liger" and case.device == "cpu":
        return {"missing": "needs a GPU"}
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": f"took more than {limit} s"}
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return {"missing": lines[-1][:120] if lines else f"killed by signal {-run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """One line a case: time, rate, share of the measured bound, peak memory."""
    bounds = {(r["op"], r["rows"], r["components"]): r for r in rows if r["candidate"] == "bound" and "seconds" in r}
    lines = [f"{'op':15} {'size':32} {'candidate':14} {'ms':>10} {'rate':>14} {'of bound':>9} {'peak MiB':>9}"]
    for row in rows:
        case = Case(**{field: row[field] for field in Case.__dataclass_fields__})
        start = f"{case.op:15} {case.size:32} {case.candidate:14} "
        if "missing" in row:
            lines.append(start + row["missing"])
            continue
        seconds, bound, share = row["seconds"], bounds.get((case.op, case.rows, case.components)), ""
        if case.candidate == "bound":
            seconds = bound_seconds(row)
        elif bound is not None:
            share = f"{100 * bound_seconds(bound) / seconds:.1f} %"
        rate = f"{case.flops / seconds / 1e12:.2f} TFLOP/s" if case.flops else f"{case.bytes / seconds / 1e9:.1f} GB/s"
        note = "  " + NOTES[case.candidate] if case.op == "lm_head" and case.candidate in NOTES else ""
        peak = "" if case.candidate == "bound" else f"{row['peak_bytes'] / 2**20:.0f}"
        lines.append(f"{start}{seconds * 1e3:10.3f} {rate:>14} {share:>9} {peak:>9}{note}")
    return "\n".join(lines)


def bound_seconds(row: dict) -> float:
    """What the measured roofline says the op takes at least."""
    if row["op"] == "reward_to_loss":
        copied = 2 * 2**28 // (1 if row["device"] == "cuda" else 4)
        case = Case(**{field: row[field] for field in Case.__dataclass_fields__})
        return case.bytes / (copied / row["seconds"])
    return row["seconds"] * (row["rows"] / 1024 if row["device"] == "cpu" else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="results so far; only what it lacks is measured")
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--only", nargs="+", metavar="CANDIDATE")
    parser.add_argument("--limit", type=int, default=600, help="seconds a case may take")
    parser.add_argument("--table", type=Path, help="measure nothing, print this file of results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device here — run with --device cpu")

    rows = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    known = {json.dumps({k: row[k] for k in Case.__dataclass_fields__}) for row in rows if "seconds" in row}
    for case in cases(arguments.device):
        wanted = case.op in (arguments.ops or OPS) and case.candidate in (arguments.only or (case.candidate,))
        if not wanted or json.dumps(asdict(case)) in known:
            continue
        print(f"{case.op}, {case.size}: {case.candidate} ...", file=sys.stderr, flush=True)
        rows = [row for row in rows if any(row[k] != v for k, v in asdict(case).items())]
        rows.append(asdict(case) | run_case(case, arguments.limit))
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{device}, torch {torch.__version__}\n{table(rows)}")
    if any("missing" in row and row["candidate"] in ("bound", "balcap") for row in rows):
        sys.exit(1)  # our own numbers are not all there


if __name__ == "__main__":
    main()
