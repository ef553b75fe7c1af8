"""Stopping: all ranks at one place, within the grace period even inside a kernel, and together with torchrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from balcap_mega.training.guard.signals import Stopped, StopRequest
from tests.support.distributed import launch

CPU = torch.device("cpu")


def stopped() -> list[str]:
    """What each of two checks said: nobody was asked to stop before the first, rank 1 before the second."""
    stop, said = StopRequest(grace_seconds=60), []
    for asked in (False, torch.distributed.get_rank() == 1):
        if asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            while stop.received is None:
                time.sleep(0.01)
        try:
            stop.check(CPU)
            said.append("go on")
        except Stopped as reason:
            said.append(str(reason))
    return said


def test_all_ranks_stop_when_one_is_asked_to():
    assert launch(2, stopped) == [["go on", "a signal to another rank"], ["go on", "SIGUSR1"]]


def start(code: str, **environment: str) -> subprocess.Popen:
    """A Python process running `code`, once it has printed a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    process.first_line = process.stdout.readline()
    return process


def test_the_grace_period_holds_inside_a_kernel():
    """Python's own handlers would run only after the product, minutes later."""
    process = start(
        "import torch; from balcap_mega.training.guard.signals import StopRequest\n"
        "stop, big = StopRequest(grace_seconds=0.5), torch.rand(12000, 12000)\n"
        "print('ready', flush=True); torch.linalg.matrix_power(big, 4000)"
    )
    process.send_signal(signal.SIGTERM)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SIGTERM came 0.5 s ago" in complaint and "goes on from the last checkpoint" in complaint


def test_ranks_end_with_their_launcher():
    rank = (
        "from balcap_mega.training.guard.signals import end_with_launcher; import os, time\n"
        "end_with_launcher(); print(os.getpid(), flush=True); time.sleep(600)"
    )
    launcher = start(
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])", TORCHELASTIC_RUN_ID="test"
    )
    pid = int(launcher.first_line)
    launcher.kill()
    deadline = time.monotonic() + 30
    while (status := Path(f"/proc/{pid}/cmdline")).exists() and status.read_text():  # a zombie's is empty
        assert time.monotonic() < deadline, "the rank outlived its launcher"
        time.sleep(0.05)
