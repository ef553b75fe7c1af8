"""Time a step with `rollout.ahead` 0 and 1, under judges of a limited rate.

    python benchmarks/ahead.py [--json FILE] [--steps 4] [--rates 0.5 1 2] [key=value ...]

Everything is real (configs/scenes_smoke.yaml on one process: vLLM, Megatron, refit) but for the judge's speed: the
rules of `scenes` answer one caption after the other, in the order in which they were asked, each in the time that makes
all of a step's captions take 0.5, 1 or 2 times the rollout's seconds. The bound is max(judge, rollout + update), where
update is all that is neither rollout nor waiting; both are measured with a judge that takes no time, before each rate.
Of `ahead_1` stand beside it the seconds that it waits for the judge, and those in which it scores captions to tell the
engine's mismatch from staleness, which the bound does not have.
"""

import argparse
import json
import queue
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from statistics import median

from balcap_mega.config.load import load_config
from balcap_mega.config.schema import RunConfig
from balcap_mega.data.sources import build_datasets
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.components import Rewards
from balcap_mega.rewards.scenes import SceneJudge
from balcap_mega.training.build import build_trainer
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.guard.signals import StopRequest
from balcap_mega.training.initial import initial_checkpoint
from balcap_mega.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
ONE_RANK = ["parallel={device: cpu, tensor: 1, sequence: false}", "rollout.tensor_parallel=1", "warmup.steps=0"]


class RatedJudge:
    """The rules of `scenes`, one caption every `seconds`, first come first served."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._judge, self._asked = SceneJudge(), queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True).start()

    def submit(self, record, caption: str, *, quotes: bool = False) -> Future:
        answer: Future = Future()
        self._asked.put((answer, record, caption))
        return answer

    def close(self) -> None:
        self._judge.close()

    def _answer(self) -> None:
        ready = 0.0
        while True:
            answer, record, caption = self._asked.get()
            ready = max(ready, time.perf_counter()) + self.seconds
            time.sleep(max(ready - time.perf_counter(), 0.0))
            answer.set_result(self._judge.submit(record, caption).result())


def steps(trainer: Trainer, ahead: int, seconds: float, count: int, first: int) -> list[dict[str, float]]:
    """The metrics of `count` steps in a row once they have settled: the first one has more to sample, the last less."""
    rollout = trainer.config.rollout.model_copy(update={"ahead": ahead})
    trainer.config = trainer.config.model_copy(update={"rollout": rollout, "steps": first + count + 2})
    judge = trainer.rewards.judge
    assert isinstance(judge, RatedJudge)
    judge.seconds = seconds
    return [trainer.step(number) for number in range(first, first + count + 2)][1:-1]


def measure(config: RunConfig, rates: list[float], count: int) -> list[dict[str, float]]:
    platform = Platform.resolve(config.parallel.device)
    grid = initialize_parallel(config.parallel, platform, config.seed)
    train_set, _ = build_datasets(config.data, config.seed)
    folder = RunFolder(Path(config.output_dir))
    start = initial_checkpoint(config, folder, train_set)
    trainer = build_trainer(config, start, train_set, grid, platform, folder, StopRequest(60))
    trainer.rewards = Rewards(config.rewards, RatedJudge(), {})
    trainer.refit.run()
    captions = config.rollout.prompts_per_step * config.rollout.group_size
    first, rows = 0, []

    def timed(ahead: int, seconds: float) -> dict[str, float]:
        nonlocal first
        found = steps(trainer, ahead, seconds, count, first)
        first += count + 2
        return {key: median(row[key] for row in found) for key in found[0] if key.startswith("seconds/")}

    timed(0, 0.0)  # compiles and caches
    for rate in rates:
        free = timed(0, 0.0)
        rollout, alone = free["seconds/rollout"], free["seconds/step"]
        judge = rate * rollout
        one_by_one, ahead = timed(0, judge / captions), timed(1, judge / captions)
        bound = max(judge, alone)
        rows.append({
            "judge_over_rollout": rate, "judge": judge, "rollout": rollout, "rollout_and_update": alone, "bound": bound,
            "ahead_0": one_by_one["seconds/step"], "ahead_1": ahead["seconds/step"],
            "ahead_1_over_bound": ahead["seconds/step"] / bound,
            "ahead_1_waits": ahead["seconds/rewards"], "ahead_1_scores": ahead["seconds/scoring"],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}", *ONE_RANK, *arguments.overrides]
        config = load_config(ROOT / "configs" / "scenes_smoke.yaml", overrides)
        rows = measure(config, arguments.rates, arguments.steps)
    for row in rows:
        print(", ".join(f"{name} {value:.2f}" for name, value in row.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
