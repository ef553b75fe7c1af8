"""Runs the ablations: one warm-up a seed, then a run a core, each of which goes on where it was stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ablation_variants import VARIANTS

from balcap_mega.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "scenes_tradeoffs.yaml"
WARM_UP = "warm_up"
WARM_UP_STEPS = 120  # a warm-up takes about as long as so many steps
SECONDS = 20  # between two lines of progress


@dataclass(frozen=True)
class Job:
    """One run: the seed's warm-up, or a variant from it."""

    variant: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def steps_done(self, steps: int) -> int:
        """In steps of reinforcement learning; a warm-up counts when it is over."""
        if self.variant == WARM_UP or self.finished:
            return self.finished * (WARM_UP_STEPS if self.variant == WARM_UP else steps)
        metrics = self.folder / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def command(self, start: Path, overrides: Sequence[str]) -> list[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command += [str(ROOT / "launch" / "pretrain_rl.py"), "--config", str(CONFIG), *overrides]
        command += [f"seed={self.seed}", f"output_dir={self.folder}"]
        if self.variant == WARM_UP:
            return [*command, "steps=0"]
        from_warm_up = ["model.tiny=null", f"model.path={start / 'warmed_up'}", "warmup.steps=0"]
        return [*command, *from_warm_up, *VARIANTS[self.variant].overrides]


def jobs(runs: Path, seeds: Sequence[int], variants: Sequence[str]) -> list[Job]:
    """Seed by seed, so that what is stopped early has whole seeds."""
    return [
        Job(variant, seed, runs.resolve() / f"seed{seed}" / variant)
        for seed in seeds
        for variant in (WARM_UP, *variants)
    ]


def keep_settings(runs: Path, overrides: Sequence[str]) -> None:
    """Refuse to mix runs of other settings with those that are there."""
    settings = {"config": CONFIG.read_text(encoding="utf-8"), "overrides": list(overrides)}
    file = runs / "settings.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != settings:
            raise UserError(
                f"{runs} holds runs with another {CONFIG.name} or other key=value",
                remedy="give another --runs, or the same key=value as then",
            )
        return
    runs.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def run_all(todo: Sequence[Job], workers: int, steps: int, overrides: Sequence[str]) -> list[Job]:
    """Run what is not finished, `workers` at a time; the jobs that failed, or that a failed warm-up kept from running.

    Ctrl-C, or SIGTERM, has each run write a checkpoint; KeyboardInterrupt is raised once all have ended.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    waiting = [job for job in todo if not job.finished]
    running: dict[Job, subprocess.Popen] = {}
    failed: list[Job] = []
    progress = _progress(todo, steps)
    next(progress)
    try:
        while waiting or running:
            for job in list(waiting):
                start = job.folder.with_name(WARM_UP)
                if job.variant != WARM_UP and any(other.folder == start for other in failed):
                    failed.append(job)
                    waiting.remove(job)
                elif len(running) < workers and (job.variant == WARM_UP or (start / "summary.json").exists()):
                    running[job] = _start(job, overrides)
                    waiting.remove(job)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    if not job.finished:
                        failed.append(job)
                        print(f"{job.variant} of seed {job.seed} ended without a result: see {job.log}", flush=True)
            print(progress.send(list(running)), end="", flush=True)
            time.sleep(1)
    except KeyboardInterrupt:
        print("\nstopping: each run writes a checkpoint first", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise
    return failed


def _start(job: Job, overrides: Sequence[str]) -> subprocess.Popen:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    command = job.command(job.folder.with_name(WARM_UP), overrides)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(job.log, "ab") as log:  # a session of its own: Ctrl-C reaches it through `run_all` alone
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)


def _progress(todo: Sequence[Job], steps: int) -> Generator[str, list[Job], None]:
    """Lines of progress, one in `SECONDS` and else nothing; it is sent the jobs that run."""
    total = sum(WARM_UP_STEPS if job.variant == WARM_UP else steps for job in todo)
    began, before, told = time.monotonic(), sum(job.steps_done(steps) for job in todo), 0.0
    line = ""
    while True:
        running = yield line
        line = ""
        now = time.monotonic()
        if now - told < SECONDS:
            continue
        told, done = now, sum(job.steps_done(steps) for job in todo)
        left = "time left unknown yet"
        if done > before:
            hours, minutes = divmod(round((total - done) / (done - before) * (now - began) / 60), 60)
            left = f"{hours} h {minutes} min left"
        at = ", ".join(f"{job.variant} of seed {job.seed} at step {job.steps_done(steps)}" for job in running)
        finished = sum(job.finished for job in todo)
        line = f"{finished} of {len(todo)} runs, {done:,} of {total:,} steps, {left}: {at}\n"
