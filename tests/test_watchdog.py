"""Ranks that die, stand still or wait: the job ends soon, and one line says which rank was where."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from balcap_mega.training.guard.watchdog import Heartbeat, account, name_ranks
from tests.support.watched_ranks import SILENCE_SECONDS, STUCK_SECONDS
from tests.test_pretrain_rl import command, rows

ROOT = Path(__file__).parent.parent
ENDLESS = 10**6
# What befalls rank 1: a fault that it meets in its program and how many steps that has, or a signal from outside.
FAULTS = {"stuck": ENDLESS, "slow": 4, "bug": ENDLESS, "stalled": ENDLESS, "dead": ENDLESS}


class Job:
    """A torchrun of two ranks; what they say goes to a file."""

    def __init__(self, arguments: list[str], log: Path):
        self.log = log
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def rank_1(self) -> int:
        """The process that is rank 1 now."""
        children = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        [pid] = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        return int(pid)

    def wait_until(self, holds, seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.log.read_text()) is not None

    def stall_rank_1(self, said: str) -> None:
        """Stop it until the others have said so. torchrun cannot end a stopped process in less than half a minute."""
        pid = self.rank_1()
        os.kill(pid, signal.SIGSTOP)
        try:
            self.wait_until(lambda: self.says(said), 100)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        """Every process of it, also if a test failed."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """One job for each fault, all at once: they mostly wait."""
    folder = tmp_path_factory.mktemp("jobs")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = {}
    for fault, steps in FAULTS.items():
        met = fault if fault in ("stuck", "slow", "bug") else "none"
        started[fault] = Job([*torchrun, "tests/support/watched_ranks.py", met, str(steps)], folder / fault)
    yield started
    for job in started.values():
        job.end()


def ended(job: Job) -> str:
    """What a job that failed said."""
    assert job.process.wait(120) == 1, job.log.read_text()[-4000:]
    return job.log.read_text()


def test_a_rank_stuck_in_native_code_is_named_with_all_stacks(jobs):
    said = ended(jobs["stuck"])
    place = r"rank 1 in rollout of step 3 for \d+ s; rank 0 in update of step 3 for \d+ s"
    assert re.search(rf"^error: no rank has finished anything for {STUCK_SECONDS} s: {place}", said, re.MULTILINE)
    assert said.count("in sleep_in_native_code\n") == 1 == said.count("in all_reduce\n")  # both ranks' stacks, once
    assert re.search(r"^rank 0 in update of step 3:$", said, re.MULTILINE)
    assert re.search(rf"traceback : error: no rank has finished anything .* {place}", said)  # torchrun's own account


def test_waiting_for_a_slow_rank_is_no_fault(jobs):
    assert jobs["slow"].process.wait(120) == 0, jobs["slow"].log.read_text()[-4000:]


def test_a_bug_keeps_its_traceback_and_the_others_name_its_rank(jobs):
    said = ended(jobs["bug"])
    assert "in fail" in said and "ValueError: a bug\n" in said and "rank 1 was in rollout of step 3" in said
    gone = "rank 1 is gone, last in rollout of step 3, where it ended with ValueError: a bug"
    assert re.search(rf"^error: rank 0 lost contact in update of step 3: .*; {gone}", said, re.MULTILINE)


def test_a_stalled_rank_is_named(jobs):
    job = jobs["stalled"]
    job.wait_until(lambda: job.says("stepping"))
    place = r"last in (rollout|update) of step \d+; rank 0 in "
    job.stall_rank_1(f"error: rank 1 has not been heard of for {SILENCE_SECONDS} s, {place}")
    said = ended(job)
    assert re.search(r"^rank 1 in (rollout|update) of step \d+:$", said, re.MULTILINE), "it too says where it was"


def test_a_dead_rank_is_named(jobs):
    job = jobs["dead"]
    job.wait_until(lambda: job.says("stepping"))
    os.kill(job.rank_1(), signal.SIGKILL)
    said = ended(job)
    gone = r"rank 1 is gone, last in (rollout|update) of step \d+ — "
    assert re.search(rf"error: rank 0 lost contact in update of step \d+: .*; {gone}", said)
    assert "Traceback" not in said.partition("lost contact")[0]


def test_wedged_engine_and_stalled_rank_in_the_whole_program(tmp_path):
    """torchrun starts the program again after the first, and it goes on from its checkpoint until the second."""
    output = tmp_path / "run"
    arguments = command(
        output, "steps=1000", "warmup.steps=0", "data.eval_size=2", "rollout.tensor_parallel=1", "checkpoint.every=1",
        "parallel.silence_seconds=15",
    )  # fmt: skip
    script = arguments.index("launch/pretrain_rl.py")
    arguments[script : script + 1] = ["--max-restarts", "1", "tests/support/wedged_engine.py"]
    job = Job(arguments, tmp_path / "log")
    try:
        place = r"rank 1 in rollout of step 2 for \d+ s; rank 0 in rewards"
        job.wait_until(lambda: job.says(rf"error: no rank has finished anything for \d+ s: {place}"))
        job.wait_until(lambda: len(rows(output)) >= 2)
        job.stall_rank_1(r"error: rank 1 has not been heard of for 15 s, last in .+; rank 0 in ")
        assert "wedged_sample" in ended(job)  # in the stacks of the first
    finally:
        job.end()
    assert [row["step"] for row in rows(output)] == list(range(1, len(rows(output)) + 1))


def test_those_furthest_behind_come_first():
    beats = {rank: Heartbeat(1, "update", 16, 90, 601.0 + rank) for rank in (0, 1, 2, 5)}
    beats[3] = Heartbeat(1, "rollout", 16, 88, 600.4)
    beats[4] = Heartbeat(1, "evaluation", None, 92, 2.0)
    assert account(beats) == (
        "rank 3 in rollout of step 17 for 600 s; ranks 0-2, 5 in update of step 17 for 606 s; "
        "rank 4 in evaluation for 2 s"
    )
    assert [name_ranks(ranks) for ranks in ([7], [0, 1], [0, 2, 3, 9])] == ["rank 7", "ranks 0-1", "ranks 0, 2-3, 9"]
