"""Rewards of one's own: README's example from its class to a whole run, and everything that may be wrong with one."""

import json
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from balcap_mega.algorithm.advantages import component_weights, compute_advantages
from balcap_mega.config.load import dump_config, load_config
from balcap_mega.config.schema import ComponentConfig, RewardConfig, RunConfig
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.diagnostics.inputs import check_own_rewards
from balcap_mega.errors import UserError
from balcap_mega.rewards.asked import AskedReward
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.rewards.factory import build_rewards, check_rewards
from balcap_mega.rewards.missing import TooManyMissing, refuse_missing
from balcap_mega.training.guard.health import Health
from balcap_mega.training.heldout import HeldOutCaption, HeldOutResult
from balcap_mega.training.observe.console import columns
from balcap_mega.training.observe.step_metrics import reward_metrics

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("### A reward of your own")[1]
CLASS, CONFIG = (re.search(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)[1] for kind in ("python", "yaml"))


@pytest.fixture(scope="module")
def records():
    dataset = ScenesDataset(2, 0, "train")
    return [dataset[0], dataset[1]]


@pytest.fixture
def example(tmp_path) -> Path:
    """README's example as files: the run's configuration."""
    package = tmp_path / "code" / "my_rewards"
    package.mkdir(parents=True)
    (package / "brevity.py").write_text(CLASS)
    tree = yaml.safe_load(CONFIG.replace("/home/me/code", str(tmp_path / "code")))
    tree |= {"output_dir": str(tmp_path / "run"), "model": {"tiny": "qwen2_5_vl", "dtype": "float32"}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_readmes_example_appears_everywhere_by_its_name(example, records):
    config = load_config(example)
    assert load_config(_written(example.parent / "again.yaml", dump_config(config))) == config
    check_rewards(config.rewards)
    rewards = build_rewards(config.rewards)
    texts = ["A red star. " * 5, "A red star. " * 20, "", records[0].reference]
    found = [rewards.submit(records[0], text).result(timeout=60) for text in texts]
    rewards.close()
    assert [list(each.components) for each in found] == [["precision", "recall", "linguistic", "brevity"]] * 4
    last = min(1.0, 30 / len(records[0].reference.split()))
    assert [each.components["brevity"] for each in found] == [1.0, 0.5, None, last]
    assert found[3].components["precision"] == found[3].components["recall"] == 1.0

    scores = [CaptionScore(each.components, 30.0, 30.0) for each in found]
    batch = build_reward_batch([scores])
    advantages = compute_advantages(batch, config.algorithm)
    assert advantages.per_component.shape == (4, 4) and advantages.per_component[3, 1] < 0
    metrics = reward_metrics(batch, advantages)
    assert metrics["reward/brevity"] == pytest.approx((1.5 + last) / 3) and metrics["reward/brevity_missing"] == 0.25
    held_out = HeldOutResult(tuple(HeldOutCaption(0, "", each.judgement, s) for each, s in zip(found, scores)))
    assert held_out.scores["brevity"] == pytest.approx(100 * (1.5 + last) / 3) and held_out.counts["brevity"] == 3
    assert held_out.metrics()["held_out/brevity_missing"] == 0.25 and "b_capscore" in held_out.scores
    assert [column.title for column in columns(batch.names)][:5] == ["b-Cap", "prec", "recall", "ling", "brevity"]
    weights = component_weights(batch.names, config.algorithm)
    assert weights == {"precision": 1.0, "recall": 1.0, "linguistic": 1.0, "brevity": 0.5}
    assert "missing_reward reward/brevity_missing" in {trend.key for trend in Health(config.health, weights).trends}


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_components_without_the_judge_have_no_b_capscore(example, records):
    config = load_config(example, ["rewards.components.precision=precision", "algorithm.length_control=none"])
    own = {"brevity": config.rewards.components["brevity"]}
    rewards = build_rewards(config.rewards.model_copy(update={"components": own}))
    assert rewards.judge is None
    found = rewards.submit(records[0], "A star.").result(timeout=60)
    rewards.close()
    batch = build_reward_batch([[CaptionScore(found.components, 2.0, 2.0)] * 2])
    assert batch.names == ("brevity",)
    metrics = reward_metrics(batch, compute_advantages(batch, config.algorithm))
    assert metrics["reward/brevity"] == 1.0 and "reward/b_capscore" not in metrics


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("options={words: many}", ["rewards.components.brevity.options.words", "integer"]),
        ("options={word: 3}", ["rewards.components.brevity.options.word is no option", "it takes words"]),
        ("options={words: 0}", ["rewards.components.brevity: its check failed", "words=0 leaves nothing to say"]),
        ("source=my_rewards.brevity:Short", ["rewards.components.brevity", "holds no class Short"]),
        ("source=my_rewards.brevty:Brevity", ["my_rewards.brevty is not installed", "rewards.components.brevity.path"]),
        ("source=json:JSONDecoder", ["json:JSONDecoder has no method score"]),
        ("path=/nowhere", ["rewards.components.brevity.path=/nowhere is no folder"]),
        ("source=brevity", ["source=brevity is nothing that a judge gives", "package.module:Class"]),
    ],
)
def test_what_is_wrong_is_one_line_with_the_rewards_name(example, change, named):
    sys.modules.pop("my_rewards", None)  # of another test's folder
    with pytest.raises(UserError) as error:
        config = load_config(example, [f"rewards.components.brevity.{change}"])
        check_rewards(config.rewards)
        build_rewards(config.rewards).close()
    assert all(part in str(error.value) for part in named) and "\n" not in str(error.value)


def test_the_doctor_asks_a_rewards_own_check(example):
    fine = check_own_rewards(load_config(example))
    assert (fine.name, fine.status, fine.detail) == ("rewards", "ok", "brevity can be asked")
    finding = check_own_rewards(load_config(example, ["rewards.components.brevity.options={words: 0}"]))
    assert finding.status == "FAIL" and "words=0 leaves nothing to say" in finding.detail


def test_a_module_that_fails_to_import_is_named(example, tmp_path):
    (tmp_path / "code" / "my_rewards" / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "code" / "my_rewards" / "worse.py").write_text("1 / 0\n")
    for module, told in (("broken", "nothing_of_that_name is not installed"), ("worse", "ZeroDivisionError")):
        sys.modules.pop("my_rewards", None)
        config = load_config(example, [f"rewards.components.brevity.source=my_rewards.{module}:X"])
        with pytest.raises(UserError, match=told):
            check_rewards(config.rewards)


def test_nothing_is_imported_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "lying_around.py").write_text("class R:\n    def score(self, record, caption):\n        return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    config = RewardConfig(components={"own": "lying_around:R"})
    with pytest.raises(UserError, match="lying_around is not installed"):
        check_rewards(config)
    check_rewards(RewardConfig(components={"own": {"source": "lying_around:R", "path": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("rewards", "algorithm", "told"),
    [
        ({"components": {}}, {}, "there is no component"),
        ({"components": {"recall_std": "recall"}}, {}, "cannot be a component's name"),
        ({"components": {"precision": "recall"}}, {}, "precision is a part of b-CapScore, not recall"),
        ({"components": {"precision": "precision"}}, {}, "algorithm.gate.components.linguistic names no component"),
        ({}, {"gate": {"components": ["utility"]}}, "algorithm.gate.components.utility names no component"),
        ({}, {"weights": {"utility": 1.0}}, "algorithm.weights.utility names no component"),
    ],
)
def test_names_must_go_together(rewards, algorithm, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        RunConfig(output_dir="unused", model={"tiny": "llava"}, rewards=rewards, algorithm=algorithm)


# Calls that fail


class Slow:
    """Never answers for "stuck", fails for "broken", is out of range for "far" and answers at once for all else."""

    def __init__(self):
        self.never, self.most, self.now, self.lock = threading.Event(), 0, 0, threading.Lock()

    def score(self, record, caption):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.05)
        if caption == "stuck":
            self.never.wait()
        with self.lock:
            self.now -= 1
        return {"broken": lambda: 1 / 0, "far": lambda: 1.5, "nan": lambda: math.nan}.get(caption, lambda: 0.5)()


def test_calls_run_at_once_and_none_is_waited_for_longer_than_its_limit(records):
    slow = Slow()
    asked = AskedReward("slow", slow, ComponentConfig(source="m:C", concurrency=4, timeout_seconds=1))
    start = time.monotonic()
    stuck = [asked.submit(records[0], "stuck") for _ in range(4)]  # every thread there is
    assert [each.result(timeout=30) for each in stuck] == [None] * 4
    good = [asked.submit(records[0], "fine") for _ in range(8)]
    bad = [asked.submit(records[0], text) for text in ("broken", "far", "nan")]
    assert [each.result(timeout=30) for each in good] == [0.5] * 8
    assert [each.result(timeout=30) for each in bad] == [None] * 3
    assert time.monotonic() - start < 20 and 4 < slow.most <= 8
    assert asked.reasons == {"timeout": 4, "ZeroDivisionError": 1, "no number in [0, 1]": 2}
    asked.close()
    slow.never.set()


def test_too_many_missing_rewards_end_the_step_and_say_why():
    batch = build_reward_batch([[CaptionScore({"utility": None if n else 0.5}, 1.0, 1.0) for n in range(4)]])
    with pytest.raises(TooManyMissing, match=r"utility 75.0%.*utility: ZeroDivisionError x3"):
        refuse_missing(batch, 0.2, {"utility: ZeroDivisionError": 3})


@pytest.mark.timeout(300)
def test_a_run_trains_on_it(example, tmp_path):
    """launch/pretrain_rl.py with README's example, on real parts."""
    command = [sys.executable, "launch/pretrain_rl.py", "--config", str(example)]
    command += [f"output_dir={tmp_path / 'run'}", "steps=1", "parallel.device=cpu", "data.train_size=8"]
    command += ["data.eval_size=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_tokens=8"]
    command += ["rollout.max_model_len=256", "packing.row_tokens=1024", "rewards.max_missing_fraction=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 <= row["reward/brevity"] <= 1 and row["reward/brevity_missing"] == 0
    assert "brevity" in json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    assert "brevity" in done.stdout and "brevity" in (tmp_path / "run" / "report.html").read_text()
