"""The program with a fault planted in it, under torchrun: `faulty_run.py FAULT --config FILE [key=value ...]`.

bad_step:   on rank 1 alone, the second step's packing meets an error
no_judge:   the judge answers nothing about held-out captions; a run that goes on has those from before its first step
"""

import sys

from balcap_mega.cli import exit_on_user_error
from balcap_mega.config.load import load_config
from balcap_mega.parallel.progress import progress
from balcap_mega.rewards.judge import Judgement


def bad_step() -> None:
    import torch

    from balcap_mega.training.batches import BatchBuilder

    pack = BatchBuilder.from_rollouts

    def from_rollouts(self, *arguments):
        if progress.position.step == 1 and torch.distributed.get_rank() == 1:
            raise OSError("a disk that only this host has is gone")
        return pack(self, *arguments)

    BatchBuilder.from_rollouts = from_rollouts


def no_judge() -> None:
    from balcap_mega.rewards.scenes import SceneJudge

    judge = SceneJudge.judge

    def answer(self, record, caption):
        gone = progress.position.phase == "evaluation"
        return Judgement(None, None, None, None, None) if gone else judge(self, record, caption)

    SceneJudge.judge = answer


def main() -> None:
    fault, _, config, *overrides = sys.argv[1:]
    with exit_on_user_error():
        {"bad_step": bad_step, "no_judge": no_judge}[fault]()
        from balcap_mega.training.run import run

        run(load_config(config, overrides))


if __name__ == "__main__":
    main()
