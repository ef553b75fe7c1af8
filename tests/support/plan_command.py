"""launch/plan.py in this process, which has imported already what takes it most of its time."""

import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

PLAN = Path(__file__).parents[2] / "launch" / "plan.py"


def plan_command(*arguments: str) -> subprocess.CompletedProcess:
    """Status and output of `python launch/plan.py arguments...`."""
    status, printed, complained = 0, StringIO(), StringIO()
    with mock.patch.object(sys, "argv", [str(PLAN), *arguments]), redirect_stdout(printed), redirect_stderr(complained):
        try:
            runpy.run_path(str(PLAN), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(sys.argv, status, printed.getvalue(), complained.getvalue())
