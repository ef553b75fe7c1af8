"""The paper's claims, tested: each part of the method taken away, over several seeds, on measures not the reward.

    python benchmarks/ablations.py [--seeds 5] [--variants full grpo ...] [--runs DIR] [--workers N]
                                   [--json FILE] [--figure FILE.svg] [key=value ...]

Every run is configs/scenes_tradeoffs.yaml on one process. The runs of a seed share its warm-up; as many go at once as
there are cores. The same command goes on where it was stopped (Ctrl-C, SIGTERM, a kill), and runs nothing twice.

All of it is a night's work on two cores: 75 runs of 240 steps and 5 warm-ups, some 11 hours at 4 s a step and core. An
hour has room for `--seeds 2 --variants full no_linguistic`. What is left is told while it runs.

It prints each variant's means on 256 held-out scenes with greedy captions and, in brackets, full minus variant: the
mean over seeds of the paired differences with its 95 % interval (Student's t). Then each claim with "held" where the
whole interval is on the claimed side of 0, "not held" where it is on the other, else "undecided".
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ablation_report import claims, claims_table, draw, means_table, measured
from ablation_runs import CONFIG, ROOT, WARM_UP, Job, jobs, keep_settings, run_all
from ablation_variants import VARIANTS

from balcap_mega.cli import exit_on_user_error
from balcap_mega.config.load import load_config
from balcap_mega.training.folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 on")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at once")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    arguments = parser.parse_args()
    with exit_on_user_error(), RunFolder(arguments.runs).held():
        sys.exit(bool(ablate(arguments)))


def ablate(arguments: argparse.Namespace) -> list[Job]:
    """Run what is left, tell what came of all; the runs without a result."""
    steps = load_config(CONFIG, arguments.overrides).steps
    keep_settings(arguments.runs, arguments.overrides)
    variants = [name for name in VARIANTS if name in {*arguments.variants, "full"}]  # full: what they are held against
    todo = jobs(arguments.runs, range(arguments.seeds), variants)
    try:
        failed = run_all(todo, arguments.workers, steps, arguments.overrides)
    except KeyboardInterrupt:
        print("the same command goes on from here")
        sys.exit(130)
    finished = [job for job in todo if job.finished and job.variant != WARM_UP]
    with ProcessPoolExecutor(arguments.workers) as pool:
        runs = list(pool.map(measured, finished))
    rows = claims(runs, variants)
    print(f"\n{means_table(runs, variants)}\n\n{claims_table(rows)}")
    if arguments.json:
        kept = {
            "command": f"python benchmarks/ablations.py --seeds {arguments.seeds} --variants {' '.join(variants)} "
            + " ".join(arguments.overrides),
            "versions": {"python": platform.python_version(), "machine": platform.machine()},
            "runs": [{"variant": r.variant, "seed": r.seed, "held_out": asdict(r.held_out)} for r in runs],
            "claims": rows,
        }
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    if arguments.figure:
        draw(runs, variants, arguments.figure)
    for job in failed:
        print(f"no result: {job.variant} of seed {job.seed}, see {job.log}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    main()
