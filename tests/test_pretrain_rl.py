"""The whole program as a user starts it: torchrun, the smoke configuration, two ranks, real parts."""

import gzip
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from balcap_mega.training.record.format import RecordedCaption, read_step

ROOT = Path(__file__).parent.parent
TIMING = ("seconds/", "throughput/", "mfu/", "refit/seconds/")


def command(output: Path, *overrides: str, ranks: int = 2) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = ["launch/pretrain_rl.py", "--config", "configs/scenes_smoke.yaml", f"output_dir={output}"]
    script.append("health.long_captions={bound: 0, steps: 2}")  # something to be told, which goes by the steps before
    return [*torchrun, *script, *overrides]


def train(output: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(output, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=280)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def without_timing(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(TIMING)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by the names that transformers loads them under."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished smoke run's folder."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = train(output, "profile.steps=[2]")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return output


def test_leaves_everything_behind(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for moment in ("before", "after"):
        assert set(summary[moment]) == {"precision", "recall", "linguistic", "b_capscore", "length_ratio"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert (finished / "config.yaml").is_file()
    assert list(finished.glob("tensorboard/events.*"))
    assert list((finished / "checkpoints").glob("step_*"))
    report = (finished / "report.html").read_text()
    assert "<img" in report
    assert "http-equiv" not in report and 'src="http' not in report


def test_a_profiled_step_leaves_a_trace_of_each_rank(finished):
    """That it computes the same is in `test_interrupted_run_continues_to_the_same_weights`, which profiles nothing."""
    traces = sorted((finished / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"step_000002_rank_{rank:04d}.json.gz" for rank in (0, 1)]
    for trace in traces:
        names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
        assert {"phase rollout", "phase rewards", "phase update", "phase refit", "aten::mm"} <= names


def test_trainer_and_engine_agree(finished):
    """Before each update: equal logprobs within fp32 tolerance, the first ratio exactly 1, no KL to itself."""
    for row in rows(finished):
        assert row["rollout/logprob_difference_max"] <= 1e-4
        assert row["policy/ratio_max_first"] == 1.0
        assert row["policy/kl_old"] == 0.0
    told = [row.get("health/long_captions") for row in rows(finished)]
    assert told == [None, rows(finished)[1]["reward/length_ratio"], None]


def test_every_caption_is_on_record_with_the_logprobs_of_both_sides(finished):
    """vLLM's mean logprob, and Megatron's out of the update, which are not the same numbers."""
    for row in rows(finished):
        captions = captions_on_record(finished, row["step"])
        assert len(captions) == 16 and {caption.staleness for caption in captions} == {0.0}
        differences = [abs(caption.trained_logprob - caption.mean_logprob) for caption in captions]
        assert 0 < max(differences) <= row["rollout/logprob_difference_max"] <= 1e-4
        assert all(len(c.judgement.units) == len(c.judgement.covered) > 0 for c in captions)


def captions_on_record(run: Path, step: int) -> list[RecordedCaption]:
    return [caption for group in read_step(run / "rollouts", step).groups for caption in group.captions]


def records(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "rollouts").glob("step_*")}


def test_what_is_on_record_is_shown(finished, monkeypatch, capsys):
    """`launch/rollouts.py`, within this process."""
    group = read_step(finished / "rollouts", 3).groups[0]
    page = finished / "rollouts.html"
    for options, captions in (([], 16), (["--step", "2", "--worst"], 16), (["--record", group.record], 4)):
        monkeypatch.setattr(sys, "argv", ["rollouts.py", str(finished), *options])
        runpy.run_path(str(ROOT / "launch" / "rollouts.py"), run_name="__main__")
        told, html = capsys.readouterr().out, page.read_text()
        assert f"page: {page}" in told and told.count(", trainer -") == html.count(", trainer -") == captions
        assert html.count("data:image/png") == (captions if "--worst" in options else captions // 4)
    assert f"step 3  {group.record}" in told and group.captions[0].text in told


def test_a_refit_says_what_it_moved(finished):
    """Two ranks whose engine holds the language model's halves once more, and float32 weights of all of them."""
    language = sum(tensor.nbytes for name, tensor in weights(finished / "policy").items() if "visual" not in name)
    for row in rows(finished):
        assert language <= row["refit/bytes"] < 1.1 * language, "halves, but for norms, which both ranks have"
        assert 0 <= row["refit/bytes_exchanged"] <= row["refit/bytes"]
        phases = [row[f"refit/seconds/{phase}"] for phase in ("offload", "wake", "transfer", "finalise")]
        assert min(phases) >= 0 < sum(phases), "of the slowest rank, each"


def test_exported_policy_loads_in_transformers(finished):
    before, after = weights(finished / "warmed_up"), weights(finished / "policy")
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved and not any("visual" in name for name in moved), "RL moves the language model and leaves vision alone"


def replayed(run: Path, output: Path, *arguments: str, ranks: int = 2) -> dict:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*torchrun, "launch/replay.py", str(run), "--json", str(output), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "policy/gradient_norm" in done.stdout
    return json.loads(output.read_text())


def test_a_recorded_step_is_replayed(finished, tmp_path):
    """Without engine and judge: at the same layout every number, at another one to rounding; the run is left alone."""
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    same = replayed(finished, tmp_path / "same.json", "--step", "3")
    other = replayed(finished, tmp_path / "other.json", "--step", "3", "parallel={device: cpu}", ranks=1)
    recorded = rows(finished)[2]
    compared = {name for name in recorded if name.startswith(("policy/", "rollout/", "reward/", "advantage/"))}
    assert (
        {"policy/loss", "policy/gradient_norm", "policy/entropy", "reward/recall"} <= compared <= set(same["metrics"])
    )
    assert {name: same["metrics"][name] for name in compared} == {name: recorded[name] for name in compared}
    for name in compared - {"rollout/logprob_difference", "rollout/logprob_difference_max"}:  # themselves rounding
        assert other["metrics"][name] == pytest.approx(recorded[name], rel=1e-3, abs=1e-5), name
    assert other["metrics"]["rollout/logprob_difference_max"] <= 1e-4
    assert other["metrics"]["policy/loss"] != recorded["policy/loss"], "the same layout again shows nothing"
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    script = [sys.executable, "launch/replay.py", str(finished), "--step", "2"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no checkpoint of step 1" in done.stderr and "steps that can: 1, 3" in done.stderr


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The Euclidean distance of all weights."""
    return sum((ours[name].double() - theirs[name].double()).square().sum() for name in theirs).sqrt().item()


@pytest.mark.timeout(900)  # three runs
def test_interrupted_run_continues_to_the_same_weights(finished, tmp_path):
    """SIGTERM to the ranks after the first step; the same command then ends where the uninterrupted run ended.

    In both its halves the optimizer is away from the device while the engine generates, evaluates and wakes. Another
    layout, whose sums round otherwise, ends near there.
    """
    output, moved = tmp_path / "interrupted", tmp_path / "moved"
    started = command(output, "parallel.offload=always")
    process = subprocess.Popen(
        started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not (output / "metrics.jsonl").exists() or not rows(output):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)[0][-4000:]
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    log = process.communicate(timeout=120)[0]
    assert process.returncode == 0, log[-4000:]
    assert len(rows(output)) < 3, "the run was to stop early"
    shutil.copytree(output, moved)

    done = train(output, "parallel.offload=always")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert list(map(without_timing, rows(output))) == list(map(without_timing, rows(finished)))
    assert records(output) == records(finished)
    ours, theirs = weights(output / "policy"), weights(finished / "policy")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    done = train(moved, "parallel={device: cpu, pipeline: 2}", "rollout.tensor_parallel=1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    travelled = distance(weights(output / "warmed_up"), theirs)
    assert 0 < distance(weights(moved / "policy"), theirs) < 0.02 * travelled
    for caption in captions_on_record(moved, 3):  # of the last pipeline stage, on record by the first
        assert caption.trained_logprob == pytest.approx(caption.mean_logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.group_sise=4"], "rollout.group_size"),
        (["rollout.group_size=1"], "rollout.group_size"),
        (["parallel.tensor=3"], "parallel.tensor"),
        (["algorithm.weights={precision: -1}"], "algorithm.weights.precision"),
        (["algorithm.gate={lower: 3, upper: 2}"], "algorithm.gate"),
        (["model={path: /nowhere}"], "model.path=/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, overrides, named):
    done = refused(tmp_path / "run", *overrides)
    assert done.returncode == 2, done.stderr[-2000:]
    assert named in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_refused(finished):
    done = refused(finished, "seed=7")
    assert done.returncode == 2
    assert "seed" in done.stderr and "another output_dir" in done.stderr


def refused(output: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Rank 0 of two alone: what is refused is refused before any rank waits for another."""
    script = [sys.executable, "launch/pretrain_rl.py", "--config", "configs/scenes_smoke.yaml", f"output_dir={output}"]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    return subprocess.run([*script, *overrides], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
