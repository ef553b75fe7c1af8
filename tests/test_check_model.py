"""launch/check_model.py as a user runs it: its last line and its exit status."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "launch" / "check_model.py"


def check_model(*arguments, ranks: int) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run([*launcher, SCRIPT, *arguments], capture_output=True, text=True, timeout=240, check=False)


def test_agreement(tiny_checkpoint):
    finished = check_model("--model", tiny_checkpoint("qwen2_5_vl"), "--tp", "2", "--sequence", ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip().endswith("agrees")


def test_difference_past_the_tolerance(tiny_checkpoint):
    finished = check_model("--model", tiny_checkpoint("llava"), "--tolerance", "1e-12", ranks=1)
    assert finished.returncode == 1
    assert finished.stdout.strip().endswith("DIFFERS")
