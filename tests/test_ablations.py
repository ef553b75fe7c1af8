"""The ablations' bookkeeping: intervals, verdicts, variants that the program takes, and which runs are still to do."""

import math
import sys
from pathlib import Path

import pytest
from scipy.stats import t, ttest_rel

from balcap_mega.config.load import load_config
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.errors import UserError
from balcap_mega.rewards.factory import check_rewards
from balcap_mega.rewards.own import load_reward

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # scripts that import one another

from ablation_report import verdict
from ablation_runs import CONFIG, jobs, keep_settings
from ablation_variants import VARIANTS, Claim
from intervals import Interval, interval


def test_intervals_are_those_of_the_paired_t_test():
    for count in (2, 3, 5, 10, 11, 12, 40, 200):
        one = [math.sin(7 * i) + 0.1 * i for i in range(count)]
        other = [math.cos(5 * i) for i in range(count)]
        found = interval([a - b for a, b in zip(one, other, strict=True)])
        expected = ttest_rel(one, other).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)
    assert math.isinf(interval([1.0]).half)
    assert interval([0.0, 2.0]).half == pytest.approx(t.ppf(0.975, 1), rel=1e-4)


@pytest.mark.parametrize(
    ("mean", "half", "more", "expected"),
    [
        (2, 1, True, "held"),
        (2, 1, False, "not held"),
        (-2, 1, True, "not held"),
        (-2, 1, False, "held"),
        (2, 3, True, "undecided"),
        (0, 0, True, "undecided"),
        (5, math.inf, True, "undecided"),
    ],
)
def test_a_verdict_is_the_intervals(mean, half, more, expected):
    assert verdict(Interval(mean, half), Claim("utility", more=more)) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_another_run_that_the_program_takes(name):
    config = load_config(CONFIG, VARIANTS[name].overrides)
    check_rewards(config.rewards)
    assert (config == load_config(CONFIG, [])) == (name == "full")
    assert VARIANTS[name].against in VARIANTS


def test_missing_judgements_are_as_many_as_said():
    record = ScenesDataset(1, seed=0, split="eval")[0]
    captions = [record.reference + " " * n for n in range(100)]
    found = {}
    for name in ("missing_masked", "missing_as_zero"):
        component = load_config(CONFIG, VARIANTS[name].overrides).rewards.components["exact"]
        reward = load_reward("exact", component)
        found[name] = [reward.score(record, caption) for caption in captions]
    masked, zeroed = found.values()
    assert 0.2 < masked.count(None) / 100 < 0.4
    assert zeroed == [0.0 if value is None else value for value in masked] and all(v is None or v > 0 for v in masked)


def test_what_is_finished_is_not_run_again_and_settings_do_not_mix(tmp_path):
    todo = jobs(tmp_path, [0, 1], ["full", "grpo"])
    assert [(job.seed, job.variant) for job in todo[:3]] == [(0, "warm_up"), (0, "full"), (0, "grpo")]
    todo[1].folder.mkdir(parents=True)
    (todo[1].folder / "summary.json").write_text("{}")
    assert [job.finished for job in todo].count(True) == 1 and todo[1].steps_done(6) == 6
    assert f"model.path={todo[0].folder / 'warmed_up'}" in todo[2].command(todo[0].folder, [])
    keep_settings(tmp_path, ["steps=6"])
    keep_settings(tmp_path, ["steps=6"])
    with pytest.raises(UserError, match="other key=value"):
        keep_settings(tmp_path, [])
