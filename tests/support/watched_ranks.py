"""What a rank does in the watchdog's tests: steps of a rollout of its own and a sum over all, and the faults planted.

torchrun --nproc-per-node 2 tests/support/watched_ranks.py FAULT STEPS
"""

import ctypes
import sys
import time

import torch

from balcap_mega.cli import exit_on_user_error
from balcap_mega.parallel.progress import progress
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.guard.watchdog import Watchdog

STUCK_SECONDS = 14  # well past the other, so that a silent rank is named as such
SILENCE_SECONDS = 7


def sleep_in_native_code() -> None:
    ctypes.CDLL(None).pause()  # for ever, without Python's lock


def be_slow() -> None:
    """Longer than a run may stand still, getting on all the while."""
    for _ in range(10):
        time.sleep(STUCK_SECONDS / 6)
        progress.mark()


def fail() -> None:
    raise ValueError("a bug")


FAULTS = {"none": lambda: None, "stuck": sleep_in_native_code, "slow": be_slow, "bug": fail}
"""What befalls rank 1 in its third rollout."""


def main() -> None:
    fault, steps = FAULTS[sys.argv[1]], int(sys.argv[2])
    StopRequest(60)  # as in the program: torchrun's SIGTERM for another rank's end does not cut this one short
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with exit_on_user_error(), Watchdog(stuck_seconds=STUCK_SECONDS, silence_seconds=SILENCE_SECONDS):
        for step in range(steps):
            if rank == 1 and step == 2:
                print("stepping", flush=True)
            with progress.phase("rollout", step):
                time.sleep(0.05)
                if rank == 1 and step == 2:
                    fault()
            with progress.phase("update", step):
                torch.distributed.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main()
