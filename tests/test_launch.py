"""What starts runs on clusters: signals reach the ranks alone, and the CUDA packages are one set that resolves."""

import os
import signal
import subprocess
import sys
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


SERVER = """
import argparse, http.server, os, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("model", "port", "tensor-parallel-size", "speculative-config"):
    parser.add_argument(f"--{name}")
options, _ = parser.parse_known_args(sys.argv[2:])
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
gpus = os.environ["CUDA_VISIBLE_DEVICES"]
name = f"{options.model} {gpus} {'guessing' if options.speculative_config else 'plain'} {os.getpid()}"
(pathlib.Path(sys.argv[1]) / options.port).write_text(name)
if options.model == "broken":
    sys.exit(3)
http.server.HTTPServer(("", int(options.port)), Healthy).serve_forever()
"""


@pytest.fixture
def judge_job(tmp_path):
    """Starts launch/judge_slurm.sh on this host as one node of eight GPUs, with servers that only answer."""
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "started").mkdir()
    jobs = []

    def start(model: str, **settings: str) -> subprocess.Popen:
        environment = {
            **os.environ, "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": str(os.getpid()), **settings,
            "JUDGE_SERVER": f"{sys.executable} {tmp_path / 'server.py'} {tmp_path / 'started'}",
        }  # fmt: skip
        command = ["bash", "launch/judge_slurm.sh", str(tmp_path / "judge"), model]
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        return jobs[-1]

    yield start
    for job in jobs:
        job.terminate()
        job.wait(timeout=30)


def test_a_judges_servers_are_started_named_in_the_file_and_started_again(judge_job, tmp_path):
    from balcap_mega.config.load import load_config

    job = judge_job("large", TEXT_MODEL="small", TEXT_GPUS="2", TENSOR="3")
    file = tmp_path / "judge"
    wait_for(lambda: file.exists(), job)
    settings = file.read_text().splitlines()
    rewards = load_config(ROOT / "configs" / "qwen2_5_vl_7b.yaml", settings).rewards
    assert len(rewards.endpoint.addresses) == 2 and rewards.endpoint.model == "large"
    endpoints = rewards.endpoints()
    assert endpoints["verify"] == rewards.endpoint
    assert {endpoints[name].model for name in ("split", "units", "cover", "language")} == {"small"}
    assert len(endpoints["split"].addresses) == 2
    started = sorted(path.read_text().split() for path in (tmp_path / "started").iterdir())
    assert [entry[:3] for entry in started] == [
        ["large", "0,1,2", "plain"], ["large", "3,4,5", "plain"],
        ["small", "6", "guessing"], ["small", "7", "guessing"],
    ]  # fmt: skip
    time.sleep(3)  # it has been seen to answer
    os.kill(int(started[0][3]), signal.SIGKILL)
    (first,) = [path for path in (tmp_path / "started").iterdir() if path.read_text().split()[1] == "0,1,2"]
    wait_for(lambda: first.read_text().split()[3] != started[0][3], job)
    job.terminate()
    job.wait(timeout=30)
    assert not file.exists()
    for path in (tmp_path / "started").iterdir():
        process = int(path.read_text().split()[3])
        wait_for(lambda process=process: not Path(f"/proc/{process}").exists())


def test_a_judge_that_cannot_start_ends_its_job(judge_job, tmp_path):
    job = judge_job("broken")
    assert job.wait(timeout=60) != 0 and not (tmp_path / "judge").exists()
    job = judge_job("large", TENSOR="16")
    assert job.wait(timeout=60) == 2 and "8 GPUs a node make no server of TENSOR=16" in job.stderr.read()


def test_srun_gives_a_node_all_its_cores(tmp_path):
    """Bound to the cores of its one task, as SLURM does by default, a node's ranks would share a core or two."""
    for name, body in {
        "srun": f'echo "$@" >> {tmp_path}/asked',
        "scontrol": "echo node0",
        "hostname": "echo h",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node0", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    subprocess.run(["bash", "launch/slurm.sh", "--config", "c"], cwd=ROOT, env=environment, check=True, timeout=60)
    judge = ["bash", "launch/judge_slurm.sh", str(tmp_path / "judge"), "model"]
    subprocess.run(judge, cwd=ROOT, env=environment, timeout=60, stderr=subprocess.DEVNULL)  # no server answers
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 3 and all("--cpu-bind=none" in line.split() for line in asked)


def wait_for(condition, job: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and (job is None or job.poll() is None)
        time.sleep(0.1)
