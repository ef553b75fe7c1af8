"""Ending early, and ending with the launcher: SIGINT, SIGTERM and SLURM's SIGUSR1 stop a run where nothing is lost."""

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
    """Raised on all ranks at once, between two updates: the weights are those of a whole number of steps."""


class StopRequest:
    """Remembers a signal; `check()` is a collective, so that every rank stops at the same place.

    A signal counts from the moment it arrives, even while the main thread is deep inside a kernel or a collective,
    where Python's own handlers would have to wait. `grace_seconds` later the process ends with status 0, wherever it
    is: the scheduler would kill it next, and the last checkpoint is as good as before.
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
        """Raise Stopped on all ranks as soon as one of them was asked to stop; they agree through `device`."""
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
    """Have the kernel kill this rank when torchrun dies; left alone, it would train on beside the run started next."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def _nothing(number: int, frame) -> None:
    """A handler, so that the signal does not kill; what is done about it happens in `StopRequest._listen`."""
