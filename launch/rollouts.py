#!/usr/bin/env python3
"""Show the captions that a run has on record, with what the judge found in them and what came of it:

python launch/rollouts.py RUN [--step N] [--record ID] [--worst]

RUN is the run's output_dir. Without --step it is the last step; with --record alone, all steps that have that record.
Prints them and writes a page with their pictures, RUN/rollouts.html.
"""

import argparse
from pathlib import Path

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.load import load_config
from balcap_mega.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--step", type=int, help="as metrics.jsonl counts them, from 1")
    parser.add_argument("--record", metavar="ID", help="captions of this record alone")
    parser.add_argument("--worst", action="store_true", help="the captions of the lowest reward")
    parser.add_argument("--page", type=Path, metavar="FILE", help="where the page goes")
    arguments = parser.parse_args()
    quiet_libraries()
    with exit_on_user_error():
        from balcap_mega.data.sources import build_datasets
        from balcap_mega.training.folder import RunFolder
        from balcap_mega.training.record.page import as_text, find, write_page

        folder = RunFolder(arguments.run)
        config = load_config(folder.config)
        found = find(folder.rollouts, arguments.step, arguments.record, arguments.worst)
        try:
            dataset = build_datasets(config.data, config.seed)[0]
        except UserError as error:
            print(f"without pictures: {error}")
            dataset = None
        title = " ".join(
            [
                "Worst captions" if arguments.worst else "Captions",
                *([f"of step {found[0].step}"] if arguments.record is None else [f"of {arguments.record}"]),
            ]
        )
        page = arguments.page or folder.root / "rollouts.html"
        write_page(page, folder.root.resolve().name, title, found, dataset)
        print(*as_text(found), f"page: {page}", sep="\n")


if __name__ == "__main__":
    main()
