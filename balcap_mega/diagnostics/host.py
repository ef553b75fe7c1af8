"""What a node must have beside its GPUs: shared memory, main memory, disk and its speed, open files."""

import hashlib
import math
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from balcap_mega.config.schema import RunConfig
from balcap_mega.diagnostics.finding import Finding, check, fail, ok, warn

GIB = 2**30
SHARED_MEMORY_NEEDED, SHARED_MEMORY_WANTED = GIB // 8, GIB
OPEN_FILES = 4096
CHECKPOINT_BYTES = 14  # a parameter: bfloat16 itself, and float32 of it and of AdamW's two moments
PROBE_BYTES, BLOCK_BYTES = 2**28, 2**23
SIGNAL_SECONDS = 60  # launch/slurm.sh has the signal come so long before the ranks must be gone


@dataclass(frozen=True)
class Needs:
    """What a run asks of one node, in bytes, counted from above: frozen parameters have no moments.

    disk:       `checkpoint.keep` checkpoints, the one that is written beside them, and the exported policy
    memory:     on GPUs, the weights of the sleeping engines and the node's share of a checkpoint on its way to the
                disk; on a CPU, also the policy with its gradients and optimizer
    checkpoint: what the node writes of one
    """

    disk: int
    memory: int
    checkpoint: int

    @classmethod
    def of(cls, config: RunConfig, parameters: int, world_size: int, local_ranks: int, on_cuda: bool) -> "Needs":
        weights = parameters * (4 if config.model.dtype == "float32" else 2)
        checkpoint = parameters * CHECKPOINT_BYTES
        disk = (config.checkpoint.keep + 1) * checkpoint + weights
        share = checkpoint * local_ranks // world_size
        memory = local_ranks * weights // config.rollout.tensor_parallel + share
        if not on_cuda:
            shards = config.parallel.tensor * config.parallel.pipeline
            memory += local_ranks * (weights + 4 * parameters + checkpoint) // shards
        return cls(disk, memory, share)


@check("shared memory")
def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """NCCL and vLLM meet in it; containers start with 64 MiB."""
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.2f} GiB free in {folder}"
    if free < SHARED_MEMORY_WANTED:
        remedy = "start the container with --ipc=host or --shm-size=16g, or delete what dead jobs left there"
        return (fail if free < SHARED_MEMORY_NEEDED else warn)(detail, remedy)
    return ok(detail)


@check("memory")
def check_memory(needs: Needs | None) -> Finding:
    """What is needed against what can be had without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    detail = f"{available / GIB:.1f} GiB available"
    if needs is None:
        return ok(detail)
    detail += f", about {needs.memory / GIB:.1f} GiB needed"
    if available < needs.memory:
        remedy = "use more nodes or fewer ranks a node, raise rollout.tensor_parallel, or end other programs"
        return fail(detail, remedy)
    return ok(detail)


@check("disk")
def check_disk(folder: Path, needs: Needs | None) -> Finding:
    """Free space, for this user, on the file system where `folder` is or will be."""
    space = os.statvfs(_standing(folder))
    free, needed = space.f_bavail * space.f_frsize, needs.disk if needs else GIB
    detail = f"{free / GIB:.1f} GiB free for output_dir={folder}, at most {needed / GIB:.1f} GiB needed"
    if free < needed:
        remedy = "free space there, give another output_dir, or lower checkpoint.keep"
        return fail(detail, remedy)
    return ok(detail)


@check("checkpoint time")
def check_checkpoint_time(config: RunConfig, needs: Needs, local_ranks: int) -> Finding:
    """Does a checkpoint reach the disk within its timeout, and after a signal before the run must be gone?

    All nodes write their shares at once, as they do here. After a signal a checkpoint that is on its way is waited for
    and one more is written: twice the time of one, beside what is left of the step's phase.
    """
    folder, limits = Path(config.output_dir), config.checkpoint
    try:
        rate = _write_rate(_standing(folder), local_ranks)
    except OSError as error:
        return fail(f"nothing can be written for output_dir={folder}: {error}", "make room there, or give another")
    seconds = needs.checkpoint / rate
    detail = (
        f"about {seconds:.0f} s for this node's {needs.checkpoint / GIB:.1f} GiB of a checkpoint at {rate / 1e6:,.0f} "
        f"MB/s to output_dir={folder}"
    )
    faster = "give an output_dir on a faster disk or use more nodes, or set"
    if seconds > limits.timeout_seconds:
        longer = f"checkpoint.timeout_seconds={math.ceil(2 * seconds)}"
        return fail(f"{detail}, checkpoint.timeout_seconds={limits.timeout_seconds}", f"{faster} {longer}")
    if 2 * seconds > limits.grace_seconds:
        grace = math.ceil(3 * seconds)
        return warn(
            f"{detail}, and a signal may have to wait for two: checkpoint.grace_seconds={limits.grace_seconds}",
            f"{faster} checkpoint.grace_seconds={grace}, with sbatch --signal=B:USR1@{grace + SIGNAL_SECONDS}",
        )
    return ok(detail)


def _standing(folder: Path) -> Path:
    """`folder`, or that of its parents in which it will be."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _write_rate(folder: Path, ranks: int) -> float:
    """Bytes a second that `ranks` threads digest and bring to the disk of `folder`, each to a file of its own."""
    block = os.urandom(BLOCK_BYTES)

    def write(count: int) -> None:
        digest = hashlib.sha256()
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(count):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    counts = [max(PROBE_BYTES // BLOCK_BYTES // ranks, 1)] * ranks
    start = time.perf_counter()
    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(write, counts))
    return sum(counts) * BLOCK_BYTES / (time.perf_counter() - start)


@check("open files")
def check_open_files(config: RunConfig | None) -> Finding:
    """Each request to a judge holds one, and so does each rank that the launcher's store serves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most: dict[str, int] = {}  # by address: endpoints that differ in the model alone may share one
    for endpoint in config.rewards.endpoints().values() if config else ():
        most |= {address: max(endpoint.concurrency, most.get(address, 0)) for address in endpoint.addresses}
    judging = sum(most.values())
    wanted = OPEN_FILES + 2 * judging
    detail = f"a process may have {soft}"
    if soft != resource.RLIM_INFINITY and soft < wanted:
        remedy = f"ulimit -n {wanted}" if hard == resource.RLIM_INFINITY or hard >= wanted else "raise the hard limit"
        return warn(detail, f"{remedy}, in the shell that starts the run")
    return ok(detail)
