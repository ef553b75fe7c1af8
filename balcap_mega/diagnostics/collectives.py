"""Times a matrix product, a message around the ring of ranks, and an all-reduce on every rank, each with a timeout.

Under torchrun these are the job's own ranks, over all its nodes. Otherwise `measure_locally` starts ranks of this node:

    torchrun --nproc-per-node N -m balcap_mega.diagnostics.collectives --device auto --output FILE
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median_low

import torch
import torch.distributed as dist

from balcap_mega.diagnostics.finding import Finding, fail, ok, some, warn
from balcap_mega.errors import UserError
from balcap_mega.parallel.host import node_name
from balcap_mega.parallel.platform import Platform

REPEATS = 5  # the best one counts: what else runs on the machine is not what is asked about
SLOW = 3.0  # times the median rank
NETWORK = (
    "check the links between nodes; NCCL_DEBUG=INFO says which it takes, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose"
)


@dataclass(frozen=True)
class RankTiming:
    """Seconds that one rank measured. ring: to receive from the rank before it. error: why there are no numbers."""

    rank: int
    node: str
    matmul: float = 0.0
    ring: float = 0.0
    all_reduce: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Sizes:
    """side: of the square matrices multiplied; message: float32 elements sent and reduced."""

    side: int
    message: int

    @classmethod
    def on(cls, platform: Platform) -> "Sizes":
        return cls(8192, 2**26) if platform.is_cuda else cls(512, 2**20)


def measure(platform: Platform, store: dist.Store, rank: int, world: int, timeout: float) -> list[RankTiming]:
    """Measure on every rank of a job at once. Rank 0 returns all timings, the others their own.

    Raises UserError naming the ranks that did not come within `timeout` seconds.
    """
    _meet(store, rank, world, timeout)
    try:
        timing = _time_rank(platform, dist.PrefixStore("collectives", store), rank, world, timeout)
    except Exception as error:  # whatever went wrong on this rank, rank 0 is to say so
        timing = RankTiming(rank, node_name(), error=str(error).splitlines()[0])
    store.set(f"timing/{rank}", json.dumps(asdict(timing)))
    if rank:
        return [timing]
    silent, timings = [], []
    deadline = time.monotonic() + timeout
    for other in range(world):
        try:
            store.wait([f"timing/{other}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
            timings.append(RankTiming(**json.loads(store.get(f"timing/{other}"))))
        except dist.DistError:
            silent.append(other)
    if silent:
        raise UserError(f"ranks {silent} fell silent in a collective", remedy=NETWORK)
    return timings


def _meet(store: dist.Store, rank: int, world: int, timeout: float) -> None:
    store.set(f"arrived/{rank}", node_name())
    deadline = time.monotonic() + timeout
    missing = set(range(world))
    while missing and time.monotonic() < deadline:
        missing = {other for other in missing if not store.check([f"arrived/{other}"])}
        time.sleep(0.05 if missing else 0)
    if missing:
        raise UserError(
            f"ranks {sorted(missing)} did not come within {timeout:.0f} s",
            remedy="see what their nodes are doing: an import from a slow disk, a GPU that hangs, a process that died",
        )


def _time_rank(platform: Platform, store: dist.Store, rank: int, world: int, timeout: float) -> RankTiming:
    sizes = Sizes.on(platform)
    device, dtype = platform.device, torch.bfloat16 if platform.is_cuda else torch.float32
    # Its own time limit would end the process: let ours, which can still speak, come first.
    dist.init_process_group(
        platform.backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=4 * timeout)
    )
    matrix = torch.ones(sizes.side, sizes.side, device=device, dtype=dtype)
    message = torch.ones(sizes.message, device=device)
    received = torch.empty_like(message)

    def ring() -> list[dist.Work]:
        following, preceding = (rank + 1) % world, (rank - 1) % world
        return dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, message, following), dist.P2POp(dist.irecv, received, preceding)]
        )

    def all_reduce() -> list[dist.Work]:
        work = dist.all_reduce(message, op=dist.ReduceOp.MAX, async_op=True)
        return [work] if work is not None else []

    def multiply() -> list[dist.Work]:
        torch.mm(matrix, matrix)
        return []

    work = {"matmul": multiply} if world == 1 else {"matmul": multiply, "ring": ring, "all_reduce": all_reduce}
    best = {name: min(_timed(start, device, name, timeout) for _ in range(REPEATS)) for name, start in work.items()}
    if world > 1 and (message[0].item() != 1.0 or received[-1].item() != 1.0):
        raise RuntimeError("wrong numbers came out of a collective")
    return RankTiming(rank, node_name(), **best)


def _timed(start: Callable[[], list[dist.Work]], device: torch.device, name: str, timeout: float) -> float:
    """Seconds from `start()` until its works are complete; a thread waits. Raises TimeoutError past `timeout`."""

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # is said to each thread
            begun = time.perf_counter()
            for part in start():
                part.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            outcome.append(time.perf_counter() - begun)
        except Exception as error:
            outcome.append(error)

    outcome: list[float | Exception] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise TimeoutError(f"{name} did not finish within {timeout:.0f} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def judge_timings(timings: Sequence[RankTiming], platform: Platform) -> Finding:
    """Whether all ranks could compute and communicate, and none much slower than the median rank."""
    if broken := [f"rank {t.rank} on {t.node}: {t.error}" for t in timings if t.error]:
        return fail(some(broken), NETWORK)
    world, size = len(timings), 4 * Sizes.on(platform).message
    if world == 1:
        return ok("one rank, which has nobody to talk to")
    bandwidth = 2 * (world - 1) / world * size / max(t.all_reduce for t in timings) / 1e9
    nodes = len({t.node for t in timings})
    place = f"{platform.backend}, {world} ranks on {nodes} node{'s' * (nodes > 1)}"
    detail = f"{place}: all-reduce of {size >> 20} MiB at {bandwidth:.2f} GB/s"
    slow = [
        f"rank {t.rank} on {t.node} {what} {getattr(t, field) / usual:.1f} times as slowly as the median rank"
        for field, what in (("matmul", "computes"), ("ring", "hears from the rank before it"))
        for usual in [median_low(getattr(timing, field) for timing in timings)]
        for t in timings
        if getattr(t, field) > SLOW * usual
    ]
    if slow:
        return warn(f"{detail}; {some(slow)}", "look at that node's GPU clocks and links, or leave it out")
    return ok(detail)


def describe_nodes(timings: Sequence[RankTiming], platform: Platform) -> list[Finding]:
    """One line for each node: how fast its slowest ranks compute, and receive from the rank before them."""
    sizes = Sizes.on(platform)
    nodes: dict[str, list[RankTiming]] = defaultdict(list)
    for timing in timings:
        if not timing.error:
            nodes[timing.node].append(timing)
    lines = []
    for node, own in nodes.items():
        computes = 2e-12 * sizes.side**3 / max(timing.matmul for timing in own)
        detail = f"ranks {own[0].rank} to {own[-1].rank}: {computes:.2f} TFLOP/s"
        if slowest := max(timing.ring for timing in own):
            detail += f", {4e-9 * sizes.message / slowest:.2f} GB/s round the ring"
        lines.append(Finding(f"node {node}", "ok", detail))
    return lines


def measure_locally(device: str, ranks: int, timeout: float) -> list[RankTiming]:
    """Start ranks on this node and `measure` on them. Raises UserError if they do not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "timings.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", __name__, "--device", device, "--timeout", str(timeout), "--output", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=6 * timeout)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{ranks} ranks on this node did not end within {6 * timeout:.0f} s", remedy=NETWORK
            ) from None
        if done.returncode or not output.exists():
            said = next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr[-200:])
            raise UserError(f"{ranks} ranks on this node failed: {said.strip()}", remedy=NETWORK)
        return [RankTiming(**row) for row in json.loads(output.read_text(encoding="utf-8"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=options.timeout)))
    timings = measure(Platform.resolve(options.device), store, rank, world, options.timeout)
    if rank == 0:
        options.output.write_text(json.dumps([asdict(timing) for timing in timings]), encoding="utf-8")
    os._exit(0)  # a collective that hangs would hold an orderly exit up


if __name__ == "__main__":
    main()
