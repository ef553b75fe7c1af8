#!/usr/bin/env python3
"""Run the update of a recorded step again, from its checkpoint, without engine and judge:

torchrun --nproc-per-node N launch/replay.py RUN --step S [key=value ...]

RUN is the run's output_dir, which is only read. `parallel.tensor=2`, `parallel.device=cpu` and the like replay it under
another layout: one machine for a step of many. Loss, gradient norm and metrics stand beside the recorded ones.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from balcap_mega.cli import exit_on_user_error, quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--step", type=int, required=True, help="as metrics.jsonl counts them, from 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write both sides there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the run's")
    arguments = parser.parse_intermixed_args()
    quiet_libraries()
    with exit_on_user_error():
        import torch

        from balcap_mega.training.record.replay import replay, table

        replayed = replay(arguments.run, arguments.step, arguments.overrides)
        if torch.distributed.get_rank() == 0:
            print(*table(replayed), sep="\n")
            if arguments.json:
                arguments.json.write_text(json.dumps(asdict(replayed), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
