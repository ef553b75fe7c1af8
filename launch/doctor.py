#!/usr/bin/env python3
"""Check a host, or a whole cluster, before a run: software, GPUs, collectives, and with --config what the run reads.

    python launch/doctor.py --config configs/RUN.yaml [key=value ...]                        this node
    torchrun --nproc-per-node N launch/doctor.py --config configs/RUN.yaml [key=value ...]   a job's ranks and nodes

Every line is ok, warn or FAIL, the last two with a remedy. Exit status 1 if there is a FAIL.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from balcap_mega.cli import exit_on_user_error, quiet_libraries
from balcap_mega.config.load import load_config

STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="the run, as YAML")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the findings there too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that replace the file's")
    arguments = parser.parse_args()
    quiet_libraries()
    with exit_on_user_error():
        config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    from balcap_mega.diagnostics.checklist import diagnose  # heavy imports only once the configuration is right

    leads = os.environ.get("RANK", "0") == "0"
    console = Console(quiet=not leads, soft_wrap=True)
    findings = []
    for finding in diagnose(config, Path(__file__).parent):
        findings.append(finding)
        line = Table.grid(padding=(0, 2))
        line.add_column(width=4)
        line.add_column(width=20)
        line.add_column()
        remedy = Text(f"\n→ {finding.remedy}") if finding.status != "ok" and finding.remedy else Text()
        line.add_row(Text(finding.status, STYLES[finding.status]), finding.name, Text(finding.detail) + remedy)
        console.print(line)
    failed = leads and any(finding.status == "FAIL" for finding in findings)
    if leads and arguments.json:
        arguments.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=1), encoding="utf-8")
    sys.stdout.flush()
    os._exit(failed)  # a collective that hangs, which a line above names, would hold an orderly exit up


if __name__ == "__main__":
    main()
