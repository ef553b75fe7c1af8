#!/usr/bin/env python3
"""Train a captioner with BalCapRL:

torchrun --nproc-per-node N launch/pretrain_rl.py --config configs/RUN.yaml [key=value ...]
"""

import argparse

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.explain import explain
from balcap_mega.config.load import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--config", metavar="FILE", help="the run, as YAML")
    wanted.add_argument("--explain", nargs="?", const="", metavar="SECTION", help="print what each key is for, and end")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the file's")
    arguments = parser.parse_args()
    quiet_libraries()
    with exit_on_user_error():
        if arguments.explain is not None:
            print(explain(arguments.explain))
            return
        config = load_config(arguments.config, arguments.overrides)
        from balcap_mega.training.run import run  # heavy imports only once the configuration is right

        run(config)


if __name__ == "__main__":
    main()
