"""The checks in their order, on one node, or on every node of a torchrun job."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.diagnostics import collectives, gpus, host, inputs, pins, software
from balcap_mega.diagnostics.finding import Finding, check
from balcap_mega.models.huggingface.hub import is_on_hub
from balcap_mega.parallel.host import node_name
from balcap_mega.parallel.platform import Platform

COLLECTIVE_SECONDS = 60.0
OTHER_NODES_SECONDS = 300.0  # that their own checks may take beyond rank 0's


@dataclass(frozen=True)
class Job:
    """This process's place among those that run the checklist, and the store where they meet; None if it is alone.

    world_size, local_ranks: of the run that is being prepared, where this process is alone
    """

    rank: int
    local_rank: int
    node: int
    nodes: int
    local_ranks: int
    world_size: int
    store: dist.Store | None

    @classmethod
    def current(cls, config: RunConfig | None) -> "Job":
        """As torchrun says. Alone: all GPUs here, or on a CPU the least number of ranks that the layout needs."""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            place = {key: int(os.environ[key.upper()]) for key in ("local_rank", "world_size")}
            node, nodes = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
            local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
            store, rank, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=COLLECTIVE_SECONDS)))
            return cls(rank, node=node, nodes=nodes, local_ranks=local_ranks, store=store, **place)
        ranks = torch.cuda.device_count()
        if not ranks or (config and config.parallel.device == "cpu"):
            shards = config.parallel.tensor * config.parallel.pipeline if config else 2
            ranks = math.lcm(shards, config.rollout.tensor_parallel) if config else 2
        return cls(rank=0, local_rank=0, node=0, nodes=1, local_ranks=ranks, world_size=ranks, store=None)


def diagnose(config: RunConfig | None, locks: Path) -> Iterator[Finding]:
    """Findings as they are made. `locks` is the folder of the lock files; without `config`, the host alone is checked.

    Under torchrun every rank must exhaust it: all take part in the collectives, each node's first rank looks at its
    node, and rank 0 also yields what is not ok on the others, under their names.
    """
    job = Job.current(config)
    asked = config.parallel.device if config else "auto"
    platform = Platform.resolve(asked if torch.cuda.is_available() else "cpu")
    own: list[Finding] = []
    read: list[inputs.NodeInputs] = []
    if job.local_rank == 0:
        yield from _kept(check_host(config, platform, locks), own)
    yield from check_ranks(platform, job)
    if job.local_rank == 0:
        yield from _kept(check_software(config, platform), own)
        if config is not None:
            yield from _kept(check_run(config, platform, job, read), own)
        if job.store is not None:
            yield from exchange(own, read, job)


def check_host(config: RunConfig | None, platform: Platform, locks: Path) -> Iterator[Finding]:
    stack = "cuda" if torch.version.cuda else "cpu"
    yield pins.check_python(stack)
    yield pins.check_requirements(stack)
    yield pins.check_lock(locks / f"{stack}.lock", stack)
    devices: list[gpus.Gpu] = []
    yield gpus.check_present(config, platform, devices)
    if devices:
        yield gpus.check_free_memory(devices)
        yield gpus.check_driver(devices)
        yield gpus.check_health(devices)
    yield host.check_shared_memory()
    yield host.check_open_files(config)


def check_ranks(platform: Platform, job: Job) -> Iterator[Finding]:
    """Measure compute and communication on all ranks. Rank 0 yields a finding for all of them, then one a node."""
    timings: list[collectives.RankTiming] = []

    @check("collectives")
    def check_collectives() -> Finding:
        if job.store is None:
            timings.extend(collectives.measure_locally(platform.device.type, job.local_ranks, COLLECTIVE_SECONDS))
        else:
            timings.extend(collectives.measure(platform, job.store, job.rank, job.world_size, COLLECTIVE_SECONDS))
        return collectives.judge_timings(timings, platform)

    finding = check_collectives()
    if job.rank == 0:
        yield finding
        yield from collectives.describe_nodes(timings, platform)


def check_software(config: RunConfig | None, platform: Platform) -> Iterator[Finding]:
    yield software.check_vllm(platform)
    yield software.check_transformer_engine(config, platform)
    yield software.check_flash_attention(platform)
    yield software.check_dali(config)


def check_run(config: RunConfig, platform: Platform, job: Job, read: list[inputs.NodeInputs]) -> Iterator[Finding]:
    if is_on_hub(config.model):
        fetched: list[RunConfig] = []
        yield inputs.check_fetched(config, fetched)
        config = fetched[0] if fetched else config
    yield inputs.check_config(config, job.world_size)
    needs = None
    if config.model.path is not None:
        yield inputs.check_checkpoint(config)
        if parameters := inputs.count_parameters(config.model.path):
            needs = host.Needs.of(config, parameters, job.world_size, job.local_ranks, platform.is_cuda)
    yield host.check_memory(needs)
    yield host.check_disk(Path(config.output_dir), needs)
    if needs is not None:
        yield host.check_checkpoint_time(config, needs, job.local_ranks)
    records: list[CaptionRecord] = []
    yield inputs.check_data(config, records, read)
    if config.model.path is not None and records:
        yield inputs.check_prompts(config, records)
    if config.rewards.endpoint is not None and config.rewards.asks_judge:
        yield inputs.check_judge(config, records)
    if not all(component.judged for component in config.rewards.components.values()):
        yield inputs.check_own_rewards(config)


def exchange(own: list[Finding], read: list[inputs.NodeInputs], job: Job) -> Iterator[Finding]:
    """Send this node's findings to rank 0, which yields those of the other nodes that are not ok.

    read: what this node reads, if it could; rank 0 compares the nodes.
    """
    told = [node_name(), [asdict(finding) for finding in own], [asdict(node) for node in read]]
    job.store.set(f"findings/{job.node}", json.dumps(told))
    if job.rank:
        return
    for number in range(1, job.nodes):
        key = f"findings/{number}"
        try:
            job.store.wait([key], timedelta(seconds=OTHER_NODES_SECONDS))
        except dist.DistError:
            yield Finding(f"node {number}", "FAIL", "its checks did not come to an end", "run the doctor there, alone")
            continue
        node, rows, theirs = json.loads(job.store.get(key))
        read = [*read, *map(inputs.NODE_INPUTS.validate_python, theirs)]
        others = [Finding(**row) for row in rows]
        for finding in others:
            if finding.status != "ok":
                yield replace(finding, name=f"{finding.name} on {node}")
        yield Finding(f"checks on {node}", "ok", f"{sum(f.status == 'ok' for f in others)} of {len(others)} ok")
    if len(read) > 1:
        yield inputs.compare_inputs(read)


def _kept(findings: Iterator[Finding], kept: list[Finding]) -> Iterator[Finding]:
    for finding in findings:
        kept.append(finding)
        yield finding
