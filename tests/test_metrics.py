"""Numbers are written once a step, survive a crash, and no step stands twice; the console is legible."""

import io
import json
import re
import time
from collections import Counter

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.inputs import RowsDigest, RunInputs
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.observe.console import REWARD_COLUMN, Console, clock
from balcap_mega.training.observe.metrics import MetricsLogger, PhaseTimer, read_metrics

METRICS = {
    "reward/b_capscore": 0.512, "reward/precision": 0.6, "reward/recall": 0.4, "reward/linguistic": 0.7,
    "reward/gate_rate": 0.125, "reward/length_ratio": 1.25, "rollout/truncated": 0.25,
    "policy/kl_reference": 0.0, "policy/kl_old": 1.5e-4,
    "policy/clip_fraction": 0.01, "policy/entropy": 1.234, "rollout/logprob_difference_max": 2.5e-6,
    "throughput/tokens_per_second_per_gpu/sample": 812.0, "seconds/step": 30.0, "seconds/rollout": 10.0,
    "seconds/rewards": 1.0, "seconds/update": 18.0, "seconds/refit": 1.0,
}  # fmt: skip
SCORES = {"precision": 50.0, "recall": 40.0, "linguistic": 60.0, "b_capscore": 48.6, "length_ratio": 1.4}


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_phases_add_up_even_when_they_fail():
    phase = PhaseTimer()
    for _ in range(2):
        with phase("a"):
            time.sleep(0.01)
    with pytest.raises(KeyError), phase("b"):
        raise KeyError
    assert list(phase.seconds) == ["a", "b"]
    assert 0.02 <= phase.seconds["a"] < 0.5


def test_rows_and_events(tmp_path):
    with MetricsLogger(tmp_path) as log:
        for step in range(3):
            log(step, {"reward/precision": step / 10})
            assert len(read_metrics(tmp_path)) == step + 1  # there at once, not at the end
    assert read_metrics(tmp_path)[-1] == {"step": 3, "reward/precision": 0.2}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("reward/precision")] == [(1, 0.0), (2, 0.1), (3, 0.2)]


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLogger(tmp_path, enabled=False) as log:
        log(0, METRICS)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_reads_as_one(tmp_path):
    with MetricsLogger(tmp_path) as log:
        for step in range(5):
            log(step, {"x": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "x"')  # the process died here, three steps after its last checkpoint
    assert len(read_metrics(tmp_path)) == 5
    with MetricsLogger(tmp_path, first_step=2) as log:
        for step in range(2, 4):
            log(step, {"x": 100.0 + step})
    expected = [(1, 0.0), (2, 1.0), (3, 102.0), (4, 103.0)]
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == expected
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("x")] == expected


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 1):
        with MetricsLogger(tmp_path, first_step) as log:
            log(first_step, METRICS)
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert {run.name.rpartition("-")[2] for run in runs} == {(tmp_path / "wandb_id").read_text()}


def console(file, enabled=True):
    config = RunConfig.model_validate(
        {"output_dir": "runs/x", "steps": 25, "model": {"tiny": "llava"}, "warmup": {"steps": 100}}
    )
    inputs = RunInputs(RowsDigest(4000, ""), RowsDigest(256, ""))
    return Console(config, ProcessGrid(0, 2, 0, 1, 0, 1), inputs, enabled=enabled, file=file)


def test_plain_log():
    file = io.StringIO()
    log = console(file)
    for step in range(100):
        log.warmup_step(step, UpdateResult(loss=2.0, gradient_norm=1.0, metrics={}))
    log.evaluation("before", SCORES, dict.fromkeys(SCORES, 256))
    for step in range(25):
        log.step(step, METRICS)
    log.evaluation("after", SCORES | {"b_capscore": 61.6}, dict.fromkeys(SCORES, 256) | {"b_capscore": 32})
    log.stopped("SIGTERM")
    text = file.getvalue()
    assert text.isprintable() or set(re.findall(r"[^\x20-\x7e]", text)) <= {"\n", "─"}  # no control codes
    assert "tensor 2 x pipeline 1 x data 1" in text and "length gate [0.5, 2] words" in text
    assert text.count("gradient norm") == 11
    heading, first, *rest = [line for line in text.splitlines() if line.startswith("step ") or "/25" in line]
    assert len(rest) == 24 + 1  # the heading comes again after 20 lines
    assert heading.split()[1] == REWARD_COLUMN.title
    numbers = "1/25 51.2 60.0 40.0 70.0 12.5 1.25 25.0 1.5e-04 1.0 1.234 2.5e-06 812 30.0 10.0 1.0 18.0 1.0 12:00"
    assert " ".join(first.split()) == numbers
    assert len(first) == len(heading)
    assert re.search(r"b-CapScore +48\.6 +61\.6 +\+13\.0", text)
    assert re.search(r"length ratio +1\.40 +1\.40 +\+0\.00 +256 *\n", text)
    assert re.search(r"b-CapScore +48\.6 +61\.6 +\+13\.0 +256 / 32 *\n", text), "scores say over how many captions"
    assert "top_p" not in text and "MFU" not in heading
    file = io.StringIO()
    console(file).step(0, METRICS | {"mfu/update": 0.417})
    assert re.search(r"tok/s/GPU +MFU% .*\n.* 812 +41\.7 ", file.getvalue()), "where the GPUs' peak is known"


def test_only_the_first_rank_speaks():
    file = io.StringIO()
    log = console(file, enabled=False)
    log.step(0, METRICS)
    log.evaluation("before", SCORES, dict.fromkeys(SCORES, 256))
    assert file.getvalue() == ""


def test_clock():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 36000)] == ["0:00", "1:00", "59:59", "10:00:00"]


def test_the_judges_counts_are_of_one_step_and_of_all_ranks():
    from balcap_mega.rewards.mllm.judge import JudgeReport
    from balcap_mega.training.observe.judge_metrics import difference, judge_metrics, total

    before = JudgeReport(
        requests=10, prompt_tokens=100, limit=8, failures=Counter(timeout=1), retries=Counter(http_429=2)
    )
    now = JudgeReport(
        requests=14, prompt_tokens=180, limit=12, failures=Counter(timeout=1), retries=Counter(http_429=5)
    )
    step = difference(now, before)
    both = judge_metrics(total([step, JudgeReport(requests=1, limit=4, failures=Counter(refusal=1))]))
    assert (both["judge/requests"], both["judge/prompt_tokens"], both["judge/concurrency"]) == (5, 80, 16)
    assert (both["judge/retries"], both["judge/retries/http_429"]) == (3, 3)
    assert (both["judge/failures"], both["judge/failures/refusal"]) == (1, 1) and "judge/failures/timeout" not in both
    assert judge_metrics(None) == {}
