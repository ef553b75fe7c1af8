"""launch/pretrain_rl.py, killed at a planned moment: torchrun starts this file instead, with the plan in KILL_PLAN.

What is killed, and the place, are planned; the program is the real one, and the kill is SIGKILL from a thread while the
main thread is wherever it then is.
"""

import json
import os
import runpy
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PRETRAIN = Path(__file__).parents[2] / "launch" / "pretrain_rl.py"
VARIABLE = "KILL_PLAN"


@dataclass(frozen=True)
class KillPlan:
    """Kill `delay` seconds after `moment` begins for the first time at or after `step`.

    moment: a phase of the run or of its step, or "checkpoint": the thread that writes one
    victim: the last rank alone, all ranks with their launcher, or the launcher alone; what torchrun restarts is spared
    """

    moment: str
    step: int
    delay: float
    victim: Literal["rank", "all", "launcher"]

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def _kill(victim: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if victim == "rank" and rank != world - 1:
        return
    if victim != "rank" and "TORCHELASTIC_RUN_ID" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    if victim != "launcher":
        os.kill(os.getpid(), signal.SIGKILL)


def _plant(plan: KillPlan) -> None:
    import balcap_mega.training.checkpoint.writer as checkpoint_writer
    from balcap_mega.training.observe.metrics import PhaseTimer
    from balcap_mega.training.trainer import Trainer

    step, armed = -1, threading.Event()
    enter_phase, run_step, write = PhaseTimer.__call__, Trainer.step, checkpoint_writer.write

    def begins(moment: str) -> None:
        if moment == plan.moment and step >= plan.step and not armed.is_set():
            armed.set()
            timer = threading.Timer(plan.delay, _kill, [plan.victim])
            timer.daemon = True
            timer.start()

    @contextmanager
    def phase(timer, name):
        begins(name)
        with enter_phase(timer, name):
            yield

    def numbered_step(trainer, number):
        nonlocal step
        step = number
        return run_step(trainer, number)

    def noticed_write(*arguments):
        begins("checkpoint")
        return write(*arguments)

    PhaseTimer.__call__, Trainer.step, checkpoint_writer.write = phase, numbered_step, noticed_write


if __name__ == "__main__":
    if VARIABLE in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        _plant(KillPlan(**json.loads(os.environ[VARIABLE])))
    runpy.run_path(str(PRETRAIN), run_name="__main__")
