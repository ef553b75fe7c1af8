"""The training program, in whose first start the engine of rank 1 never comes back from its second rollout."""

import ctypes
import os
import runpy
from pathlib import Path

from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.training.guard.watchdog import Watchdog

STUCK_SECONDS = 10

sample, enter = RolloutEngine.sample, Watchdog.__enter__
watchdogs = []


def remember(self: Watchdog) -> Watchdog:
    watchdogs.append(self)
    return enter(self)


def wedged_sample(self: RolloutEngine, prompts, *, step, **options):
    if step == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        for watchdog in watchdogs:
            watchdog.stuck_seconds = STUCK_SECONDS  # only now: the start takes longer on a busy machine
        if os.environ["RANK"] == "1":
            self.llm.step = lambda: ctypes.CDLL(None).pause()  # in native code, without Python's lock
    return sample(self, prompts, step=step, **options)


if __name__ == "__main__":
    Watchdog.__enter__, RolloutEngine.sample = remember, wedged_sample
    runpy.run_path(str(Path(__file__).parents[2] / "launch" / "pretrain_rl.py"), run_name="__main__")
