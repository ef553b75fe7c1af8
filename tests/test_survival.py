"""Side work loses no main work, an error before an update loses no step, and metrics say what their names say."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.algorithm.metrics import MAXIMA, SUMS
from balcap_mega.config.schema import AlgorithmConfig, HealthConfig, RunConfig
from balcap_mega.errors import UserError
from balcap_mega.packing.assign import RowAssignment
from balcap_mega.parallel.agreement import failing_together
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.rewards.judge import Judgement
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.guard.health import Health
from balcap_mega.training.heldout import HeldOutCaption, HeldOutResult
from balcap_mega.training.learner import UpdateResult
from balcap_mega.training.observe.console import cautions
from balcap_mega.training.observe.report import score_rows
from balcap_mega.training.observe.step_metrics import step_metrics
from balcap_mega.training.truncation import TrainedOn, without_truncated
from tests.support.distributed import launch
from tests.test_pretrain_rl import ROOT, rows

CPU = torch.device("cpu")


# Errors


def one_rank_fails() -> str:
    try:
        with failing_together(CPU):
            if torch.distributed.get_rank() == 1:
                raise UserError("a picture is gone", remedy="bring it back")
    except UserError as error:
        message = str(error)
    with failing_together(CPU):
        pass
    try:
        with failing_together(CPU):
            raise KeyError(torch.distributed.get_rank())
    except KeyError as error:
        return f"{message} / {error}"


def test_what_fails_on_one_rank_fails_on_all_and_names_it():
    other, failing = launch(2, one_rank_fails)
    assert failing == "a picture is gone — bring it back / 1"
    assert other.startswith("rank 1 on ") and other.endswith(": a picture is gone — bring it back / 0")


def faulty(fault: str, output: Path, *overrides: str) -> subprocess.CompletedProcess:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    small = ["warmup.steps=0", "data.eval_size=2", "rollout.prompts_per_step=2", "rollout.group_size=2"]
    script = ["tests/support/faulty_run.py", fault, "--config", "configs/scenes_smoke.yaml", f"output_dir={output}"]
    return subprocess.run(
        [*torchrun, *script, *small, "rollout.max_tokens=8", "checkpoint.every=100", *overrides],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.timeout(600)  # two runs
def test_neither_an_error_before_an_update_nor_an_evaluation_without_a_judge_loses_a_step(tmp_path):
    """Rank 1 alone fails in the second step: the first is saved. Gone on with, evaluations fail: all else is there."""
    output = tmp_path / "run"
    done = faulty("bad_step", output)
    assert done.returncode == 1
    assert "rank 1 on " in done.stderr and "OSError: a disk that only this host has is gone" in done.stderr
    assert (output / "checkpoints" / "latest").read_text().strip() == "step_000001"
    assert [row["step"] for row in rows(output)] == [1]

    done = faulty("no_judge", output, "eval_every=1")
    assert done.returncode == 1, done.stderr[-4000:]
    assert "too many of the held-out captions: missing" in done.stderr
    assert "the same command again evaluates it" in done.stderr and "Traceback" not in done.stderr.split("error: ")[0]
    assert done.stdout.count("warn: no held-out scores after step") == 2
    assert [row.get("held_out/failed") for row in rows(output)] == [None, 1.0, 1.0]
    assert (output / "checkpoints" / "latest").read_text().strip() == "step_000003"
    assert list((output / "policy").glob("*.safetensors"))


# Held-out scores


def held_out(*precisions: float | None) -> HeldOutResult:
    judgement = Judgement(None, None, None, None, None)
    return HeldOutResult(
        tuple(
            HeldOutCaption(
                index,
                "A cat.",
                judgement,
                CaptionScore({"precision": precision, "recall": 0.5, "linguistic": 0.5}, 2.0, 2.0),
            )
            for index, precision in enumerate(precisions)
        )
    )


def test_scores_say_over_how_many_captions_they_are():
    one = held_out(0.25, *[None] * 7)
    assert one.scores["precision"] == 25.0
    assert one.counts == {"precision": 1, "recall": 8, "linguistic": 8, "b_capscore": 1, "length_ratio": 8}
    assert one.metrics()["held_out/precision_missing"] == 7 / 8
    table = {row["label"]: row["captions"] for row in score_rows(one.scores, one.scores, one.counts, one.counts)}
    assert table == {"precision": "1", "recall": "8", "linguistic": "8", "b-CapScore": "1", "length ratio": "8"}
    none = held_out(None, None)
    assert math.isnan(none.scores["precision"]) and math.isnan(none.scores["b_capscore"])
    [row, *_] = score_rows(one.scores, none.scores, one.counts, none.counts)
    assert (row["after"], row["captions"], row["stop"]) == ("nan", "1 / 0", 0.0)


# Step metrics


def update(tokens: int, *, applied: bool = True, **values: float) -> UpdateResult:
    metrics = dict.fromkeys((*SUMS, *MAXIMA), 0.0) | {"tokens": float(tokens)} | values
    return UpdateResult(loss=1.0, gradient_norm=1.0, metrics=metrics, applied=applied)


def metrics_of(updates: list[UpdateResult], finished: tuple[bool, ...] = (True, True)) -> dict[str, float]:
    rollouts = tuple(Rollout((1, 2), (-1.0, -1.0), "A cat.", each) for each in finished)
    group = RolloutGroup(0, (1,), rollouts, SeenRecord(0, "a", "", "rank 0"))
    rewards = build_reward_batch(
        [[CaptionScore({"precision": 0.5, "recall": 0.5, "linguistic": 0.5}, 2.0, 2.0) for _ in finished]]
    )
    count = len(finished)
    advantages = Advantages(torch.zeros(count), torch.zeros(3, count), torch.zeros(count, dtype=torch.bool))
    packed = [RowAssignment(((),), 10, 0, 10, 1.0)]
    return step_metrics([group], rewards, advantages, packed, updates, {"update": 1.0})


def test_metrics_of_a_step_are_over_all_its_tokens():
    """22, 82 and 89 tokens: with 10, 20 and 35 clipped, 65 of 193 are, whatever the mean of the three shares is."""
    updates = [
        update(22, clip_fraction=10 / 22, engine_logprob_difference=0.1, engine_logprob_difference_max=0.2),
        update(82, clip_fraction=20 / 82, engine_logprob_difference=0.2, engine_logprob_difference_max=0.9),
        update(89, clip_fraction=35 / 89, engine_logprob_difference=0.3, engine_logprob_difference_max=0.4),
    ]
    metrics = metrics_of(updates)
    assert metrics["policy/clip_fraction"] == pytest.approx(65 / 193)
    assert metrics["rollout/logprob_difference"] == pytest.approx((2.2 + 16.4 + 26.7) / 193)
    assert metrics["rollout/logprob_difference_max"] == 0.9
    bad = update(22, applied=False, clip_fraction=math.nan, ratio_max=math.nan)
    metrics = metrics_of([updates[0], bad])
    assert metrics["policy/clip_fraction"] == pytest.approx(10 / 22), "one that was left out moved nothing"
    assert math.isnan(metrics["policy/ratio_max"]), "no number hides one that is none"
    assert math.isnan(metrics_of([bad])["policy/clip_fraction"])


# Truncation and truncated distributions


def test_captions_that_were_cut_are_told():
    health = Health(HealthConfig.model_validate({"truncated": {"steps": 1, "bound": 0.4}}), {"precision": 1.0})
    metrics = metrics_of([update(4)], finished=(True, False))
    assert metrics["rollout/truncated"] == 0.5
    [finding] = health.observe(1, metrics)
    assert (finding.check, finding.policy, finding.sound) == ("truncated", "warn", True)
    assert health.observe(2, metrics_of([update(4)])) == []


def test_a_cut_caption_is_scored_or_left_out_of_the_loss():
    def group(place: int, *finished: bool) -> RolloutGroup:
        rollouts = tuple(Rollout((place, n), (-1.0, -1.0), f"{place}.{n}", end) for n, end in enumerate(finished))
        return RolloutGroup(place, (1,), rollouts, SeenRecord(0, "a", "", "rank 0"))

    groups = [group(0, True, False, True), group(1, False, False), group(2, False, True)]
    values = torch.arange(1.0, 8.0)
    advantages = Advantages(values, torch.stack([values, -values]), values > 2)
    assert without_truncated(groups, advantages, AlgorithmConfig()) == TrainedOn(groups, advantages, range(7))
    trained_on = without_truncated(groups, advantages, AlgorithmConfig(truncated="mask"))
    kept, left = [[rollout.text for rollout in each.rollouts] for each in trained_on.groups], trained_on.advantages
    assert kept == [["0.0", "0.2"], ["1.0"], ["2.1"]]
    assert trained_on.numbers == [0, 2, 3, 6]
    assert left.values.tolist() == [1.0, 3.0, 0.0, 7.0], "a group cut throughout keeps a caption that moves nothing"
    assert left.per_component[1].tolist() == [-1.0, -3.0, -4.0, -7.0]
    assert left.gated.tolist() == [False, True, True, True]
    assert values.tolist() == list(range(1, 8)), "the step's metrics still see every advantage"


def test_a_bias_that_no_metric_shows_is_told():
    config = RunConfig(output_dir="unused", model={"tiny": "llava"})
    assert cautions(config) == []
    [caution] = cautions(config.model_copy(update={"rollout": config.rollout.model_copy(update={"top_p": 0.9})}))
    assert caution.startswith("rollout.top_p=0.9") and "not corrected" in caution
