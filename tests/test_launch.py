"""What starts runs on clusters: signals reach the ranks alone, and the CUDA packages are one set that resolves."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RANK = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / os.environ["RANK"]
def stop(number, frame):
    place.write_text(signal.Signals(number).name)
    time.sleep(1)  # as if it finished its step and saved
    sys.exit(0)
signal.signal(signal.SIGUSR1, stop)
place.touch()
time.sleep(100)
sys.exit("nobody asked me to stop")
"""


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_ranks_and_not_torchrun(tmp_path, sent):
    """Sent to the node's script, as SLURM does; SIGUSR1 also to torchrun, as SLURM does on some clusters."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    environment = {**os.environ, "RANKS_PER_NODE": "2", "MAX_RESTARTS": "0"}
    node = subprocess.Popen(
        ["bash", "launch/node.sh", str(script), str(tmp_path)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert node.poll() is None and time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.1)
        if sent is signal.SIGUSR1:
            (torchrun,) = subprocess.run(["pgrep", "-P", str(node.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(torchrun), sent)
        node.send_signal(sent)
        log, _ = node.communicate(timeout=60)
    finally:
        node.kill()
    assert node.returncode == 0, log
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["SIGUSR1", "SIGUSR1"]


def test_cuda_lock_is_what_setup_py_resolves_to():
    """Metadata alone is read; nothing is installed. Also with the extra `flash`, and beside what the tests need."""
    done = subprocess.run(["bash", "launch/lock.sh", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
