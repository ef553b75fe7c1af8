"""One step of one rank's learner, dry: it is built, scores, updates, offloads, refits and saves as in a run."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from balcap_mega.config.schema import RunConfig
from balcap_mega.parallel.groups import ProcessGrid, initialize_parallel
from balcap_mega.planning.dry_run.batches import StepBatches
from balcap_mega.planning.dry_run.checkpoint import save_dry
from balcap_mega.planning.dry_run.collectives import Collectives, megatron_groups
from balcap_mega.planning.dry_run.device import DryDevice
from balcap_mega.planning.dry_run.gpu_branches import cpu_branches, cpu_platform, gpu_branches, gpu_platform
from balcap_mega.planning.dry_run.ledger import Peak
from balcap_mega.planning.dry_run.refit import refit_dry
from balcap_mega.planning.dry_run.waits import Waits
from balcap_mega.planning.dry_run.watched import name_tensors, watched
from balcap_mega.planning.dry_run.world import fake_world
from balcap_mega.planning.workload import Rows, Workload
from balcap_mega.rollout.refit.refit import RefitReport
from balcap_mega.training.build import build_learner
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.off_policy import by_caption
from balcap_mega.training.update import update_policy


@dataclass(frozen=True)
class DryStep:
    """What a step of one rank takes; its rows are those of the data-parallel rank with the most to do.

    peaks:       the device's memory, by moment
    flops:       by moment; a multiply-add is two
    rows:        tokens of each microbatch of the step's updates
    checkpoint:  bytes of the host's memory that a checkpoint takes until it is written
    offloaded:   bytes of the host's memory that the optimizer's state waits in
    stand_ins:   how often each was called
    seconds:     that this dry run took
    """

    rank: int
    grid: ProcessGrid
    peaks: dict[str, Peak]
    flops: dict[str, float]
    collectives: Collectives
    refit_collectives: Collectives
    waits: Waits
    rows: list[int]
    refit: RefitReport
    checkpoint: int
    offloaded: int
    stand_ins: dict[str, int]
    seconds: float


def dry_step(
    config: RunConfig, folder: Path, workload: Workload, rows: Rows, rank: int, world: int, *, gpu: bool = True
) -> DryStep:
    """Run the learner's side of one step of `rank` of `world`; `folder` holds the model's config.json.

    rows: of whose `rank` the rows are
    gpu:  take a GPU's branches; else a CPU's
    """
    began, device = time.monotonic(), DryDevice(granularity=512 if gpu else 1)
    platform, branches = (gpu_platform(), gpu_branches) if gpu else (cpu_platform(), cpu_branches)
    with fake_world(rank, world), branches(device), device, watched(device):
        grid = initialize_parallel(config.parallel, platform, config.seed)
        device.collectives.groups.update(megatron_groups())
        ledger = device.ledger
        with ledger.during("build"):
            learner = build_learner(config, folder, platform)
            name_tensors(learner, ledger)
        batches = StepBatches(config, learner.architecture, workload, replace(grid, data_rank=rows.rank), device)
        with ledger.during("first update"):  # which allocates the optimizer's moments
            learner.update(batches.to_train()[0][:1], _accept)
            name_tensors(learner, ledger)
            learner.offload()
        device.start_counting()
        with ledger.during("swap"):
            learner.onload()
        _score(learner, batches, config.rollout.ahead)
        minibatches = batches.to_train()
        update_policy(learner, minibatches, _accept)
        tokens = [microbatch.row.tokens.numel() for rows in minibatches for microbatch in rows]
        del minibatches
        with ledger.during("swap"):
            learner.offload()
        offloaded = learner.optimizer_offload.host_bytes
        ledger.note("rollout")
        flops, waits, collectives = dict(device.flops), device.waits.copy(), device.collectives.copy()
        device.collectives.clear()
        refit = refit_dry(learner, config, device)
        refit_collectives = device.collectives.copy()
        learner.onload()
        peaks, ledger.peaks = ledger.peaks, {}
        return DryStep(
            rank=rank,
            grid=grid,
            peaks=peaks,
            flops=flops,
            collectives=collectives,
            refit_collectives=refit_collectives,
            waits=waits,
            rows=tokens,
            refit=refit,
            checkpoint=save_dry(learner, device),
            offloaded=offloaded,
            stand_ins=dict(device.stand_ins),
            seconds=time.monotonic() - began,
        )


def _accept(result: UpdateResult) -> bool:
    return True


def _score(learner: Learner, batches: StepBatches, ahead: int) -> None:
    """As `Trainer.off_policy`: some captions of this step and of the next one."""
    for _ in range(2 * ahead):
        microbatches, captions = batches.to_score()
        by_caption(microbatches, learner.logprobs(microbatches), captions)
