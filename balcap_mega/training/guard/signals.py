"""Stops a run between two updates on SIGINT, SIGTERM or SLURM's SIGUSR1, and ends a rank when its launcher dies."""

import ctypes
import os
import signal
import socket
import sys
import threading

import torch

from balcap_mega.parallel.agreement import any_rank

PR_SET_PDEATHSIG = 1


class Stopped(Exception):
    """The run was asked to stop. Raised on all ranks at once, between two steps."""


class StopRequest:
    """Takes note of a signal. `check` makes all ranks stop at the same place.

    A thread reads the signals, so that one counts from its arrival even while the main thread is inside a kernel or a
    collective, where Python's own handlers would have to wait. The process exits with status 0 if it has not stopped
    `grace_seconds` later: the scheduler would kill it next, and the last checkpoint is valid.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.received: signal.Signals | None = None
        self._wakeups, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self.SIGNALS:
            signal.signal(number, _nothing)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def check(self, device: torch.device) -> None:
        """Raise Stopped on all ranks if any of them was asked to stop. A collective on `device`."""
        if any_rank(self.received is not None, device):
            raise Stopped(self.received.name if self.received else "a signal to another rank")

    def _listen(self) -> None:
        while number := self._wakeups.recv(1):
            if number[0] in self.SIGNALS and self.received is None:
                self.received = signal.Signals(number[0])
                timer = threading.Timer(self.grace_seconds, self._give_up)
                timer.daemon = True
                timer.start()

    def _give_up(self) -> None:
        print(
            f"{self.received.name} came {self.grace_seconds:g} s ago (checkpoint.grace_seconds) and no place to stop "
            "at since; the same command goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(0)


def end_with_launcher() -> None:
    """Have the kernel kill this rank when torchrun dies: it would otherwise train on, beside a run started anew."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def _nothing(number: int, frame) -> None:
    """A handler that keeps the signal from killing the process; `StopRequest._listen` acts on the signal."""
