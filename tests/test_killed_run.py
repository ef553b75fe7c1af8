"""A run that is killed again and again, at moments nobody chose, ends as one that was left alone."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.killed_run import KillPlan
from tests.test_pretrain_rl import ROOT, captions_on_record, records, rows, weights, without_timing

STEPS = 10
# Where the time goes, and where something is left behind; each moment's longest delay in seconds covers it.
BEFORE_STEPS = {"warmup": 4.0, "setup": 8.0, "evaluation": 1.5}
IN_STEPS = {"rollout": 1.2, "rewards": 0.05, "update": 0.5, "refit": 0.1, "checkpoint": 0.08}
AT_THE_END = {"export": 0.1}
OVERRIDES = [f"steps={STEPS}", "eval_every=3", "checkpoint.every=2", "warmup.steps=4", "data.eval_size=4"]


def plans(victims: list[str], seed: int, *, outside: bool) -> list[KillPlan]:
    """A kill a moment, in the order in which a run that always goes on meets them.

    outside: before the steps and after them too
    """
    draw = random.Random(seed)
    inside = [(moment, n * STEPS // len(IN_STEPS), longest) for n, (moment, longest) in enumerate(IN_STEPS.items())]
    before, after = ([(moment, -1, longest) for moment, longest in them.items()] for them in (BEFORE_STEPS, AT_THE_END))
    chosen = [*before, *inside, *after] if outside else inside
    return [
        KillPlan(moment, step, draw.uniform(0, longest), victims[number % len(victims)])
        for number, (moment, step, longest) in enumerate(chosen)
    ]


def start(
    output: Path, ranks: int, overrides: list[str], plan: KillPlan | None = None, restarts: int = 0
) -> subprocess.CompletedProcess:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
    launcher = [*torchrun, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    script = ["tests/support/killed_run.py", "--config", "configs/scenes_smoke.yaml", f"output_dir={output}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(plan.environment() if plan else {})}
    return subprocess.run(
        [sys.executable, *launcher, *script, *OVERRIDES, *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def finish(output: Path, ranks: int, overrides: list[str]) -> Path:
    done = start(output, ranks, overrides)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert list(map(without_timing, rows(ours))) == list(map(without_timing, rows(theirs)))
    assert len(rows(ours)) == STEPS
    assert records(ours) == records(theirs) and len(records(ours)) == STEPS
    mine, other = weights(ours / "policy"), weights(theirs / "policy")
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


ONE_RANK = ["parallel={device: cpu, tensor: 1, sequence: false}", "rollout.tensor_parallel=1"]
AHEAD = "rollout.ahead=1"
CHAINS = [
    pytest.param(2, [], False, ["rank", "all", "launcher"], id="two ranks under torchrun"),
    pytest.param(1, [*ONE_RANK, AHEAD], True, ["rank"], id="captions in flight"),
]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("ranks", "overrides", "outside", "victims"), CHAINS)
def test_killed_at_random_moments_it_ends_as_if_left_alone(ranks, overrides, outside, victims, tmp_path):
    whole = finish(tmp_path / "whole", ranks, overrides)
    killed = tmp_path / "killed"
    for plan in plans(victims, ranks, outside=outside):
        stopped = start(killed, ranks, overrides, plan)
        assert stopped.returncode != 0, f"{plan} killed nothing"
    assert_same_end(finish(killed, ranks, overrides), whole)
    stale = [row["rollout/staleness"] > 0 for row in rows(killed)]
    assert stale == [False, *[AHEAD in overrides] * (STEPS - 1)], "captions are of the weights of one step before"
    assert all(row["rollout/logprob_difference_max"] <= 1e-4 for row in rows(killed))
    for row in rows(killed)[1:]:
        known = [c for c in captions_on_record(killed, row["step"]) if c.staleness is not None]
        total = sum(c.staleness * len(c.token_ids) for c in known)
        assert total / sum(len(c.token_ids) for c in known) == pytest.approx(row["rollout/staleness"])
        assert all(abs(c.trained_logprob - c.mean_logprob) <= c.staleness + 1e-4 for c in known)
        assert len(known) == (4 if AHEAD in overrides else 16), "one prompt of four is scored when it is sampled"


@pytest.mark.timeout(600)
def test_torchrun_restarts_by_itself_what_was_killed(tmp_path):
    """One rank dies in its second step; the restarted ranks end the run as if nothing had happened."""
    plan = KillPlan("update", 1, 0.0, "rank")
    done = start(tmp_path, 2, ["steps=3", "checkpoint.every=1"], plan, restarts=1)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert done.stdout.count("Reinforcement learning") == 2, "it was to be started twice"
