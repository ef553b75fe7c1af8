"""Runs the tests of the kernels in Triton's interpreter, which a process must ask for before it imports Triton."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            str(HERE / "test_kernels.py"),
            str(HERE / "test_kernels_in_training.py"),
        ],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0
