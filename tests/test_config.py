"""A config file and its overrides become a typed run, or one error that names the key and the remedy."""

import subprocess
import sys

import pytest

from balcap_mega.config.explain import explain
from balcap_mega.config.load import dotted_fields, dotted_keys, dump_config, load_config
from balcap_mega.errors import UserError

BASE = "output_dir: runs/x\nmodel: {tiny: llava}\n"


@pytest.fixture
def load(tmp_path):
    def load(text=BASE, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return load


def test_file_defaults_and_overrides(load):
    config = load(
        BASE + "rollout:\n  group_size: 4\n",
        "rollout.group_size=6",
        "optimizer.learning_rate=1e-6",
        "algorithm.dual_clip=null",
        "rewards.cache_dir=a=b",
        "algorithm.weights={precision: 2, recall: 0}",
        "optimizer.betas=[0.8, 0.99]",
        "rollout.group_size=7",
    )
    assert config.rollout.group_size == 7  # the last override wins
    assert config.optimizer.learning_rate == 1e-6  # PyYAML alone reads a string here
    assert config.rewards.cache_dir == "a=b"
    assert config.algorithm.weights == {"precision": 2.0, "recall": 0.0}
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.rollout.temperature == 1.0


def test_resolved_config_reads_back_equal(load, tmp_path):
    config = load(BASE, "rewards.component_endpoints.recall={base_url: 'http://localhost:1', model: m}", "seed=7")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


REFUSED = {
    # what is wrong: (overrides, what the one line must say)
    "value too small": (["rollout.group_size=1"], ["rollout.group_size=1", "greater than or equal to 2"]),
    "negative weight": (["algorithm.weights.recall=-1"], ["algorithm.weights.recall=-1", "equal to 0"]),
    "all weights zero": (["algorithm.weights={recall: 0}"], ["algorithm", "positive weight"]),
    "gate bounds": (["algorithm.gate.lower=3"], ["algorithm.gate", "lower=3.0", "upper=2.0", "lower <= upper"]),
    "not a number": (["optimizer.learning_rate=fast"], ["optimizer.learning_rate='fast'", "valid number"]),
    "not a choice": (["algorithm.normalization=ppo"], ["algorithm.normalization='ppo'", "'gdpo' or 'grpo'"]),
    "infinite": (["optimizer.learning_rate=.inf"], ["optimizer.learning_rate=inf", "finite"]),
    "typo": (["rollout.group_sise=8"], ["rollout.group_sise", "did you mean rollout.group_size?"]),
    "typo in a section": (["rolout.group_size=8"], ["override rolout", "did you mean rollout?"]),
    "section forgotten": (["group_size=8"], ["group_size", "did you mean rollout.group_size?"]),
    "typo in a named section": (
        ["rewards.component_endpoints.recall={base_ur: a, base_url: b, model: c}"],
        ["did you mean rewards.component_endpoints.recall.base_url?"],
    ),
    "unknown component": (["algorithm.weights.precison=1"], ["algorithm.weights.precison", "'precision'"]),
    "like no key": (["xyzzy=1"], ["xyzzy", "known here: output_dir, seed"]),
    "no equals sign": (["rollout.group_size"], ["'rollout.group_size'", "key=value"]),
    "broken value": (["seed=[1"], ["'seed=[1'", "line 1"]),
    "value, no section": (["output_dir.x=3"], ["output_dir.x=3", "not a section"]),
    "two models": (["model.path=/m"], ["path=/m", "tiny=llava", "exactly one"]),
    "sequence without tensor": (["parallel.sequence=true"], ["parallel", "tensor >= 2"]),
    "judge without data": (["rewards={judge: mllm, endpoint: {base_url: 'http://u', model: m}}"], ["judge=mllm"]),
    "fp8 of float32": (["model.dtype=float32", "model.fp8=hybrid"], ["fp8=hybrid", "model.dtype=bfloat16"]),
    "fp8 uncorrected": (["rollout.fp8=true", "algorithm.importance_cap=null"], ["rollout.fp8=true", "importance_cap"]),
    "several at once": (["seed=-1", "steps=x"], ["seed=-1", "steps='x'"]),
}


@pytest.mark.parametrize("overrides, said", REFUSED.values(), ids=REFUSED.keys())
def test_refused_override(load, overrides, said):
    with pytest.raises(UserError) as caught:
        load(BASE, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "holds no keys"),
        ("- a\n", "holds no keys"),
        ("output_dir: [\n", "line 2"),
        (BASE + "seed: 1\nseed: 2\n", "line 4: key 'seed' is given twice"),
        (BASE + "rollout:\n  group_size: 4\n  group_size: 4\n", "line 5: key 'group_size' is given twice"),
        ("model: {tiny: llava}\n", "output_dir is missing"),
        (BASE + "steps: many\n", "steps='many'"),
        (BASE + "seed: !!python/object/apply:os.getcwd []\n", "line 3"),
    ],
)
def test_refused_file(load, text, said):
    with pytest.raises(UserError, match=r"run\.yaml") as caught:
        load(text)
    assert said in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_every_key_is_listed_once():
    keys = list(dotted_keys())
    assert len(keys) == len(set(keys))
    assert {"model", "model.path", "rewards.endpoint.base_url", "rewards.component_endpoints.*.model"} <= set(keys)


SCRIPT = """
from balcap_mega.cli import exit_on_user_error
from balcap_mega.errors import UserError
with exit_on_user_error():
    raise {error}
"""


@pytest.mark.parametrize(
    "rank, error, status, said",
    [
        (
            "0",
            "UserError('seed=x is refused', remedy='give a number')",
            2,
            "error: seed=x is refused — give a number\n",
        ),
        ("1", "UserError('a', remedy='b')", 2, "error on rank 1: a — b\n"),
        ("0", "KeyError('a bug')", 1, "Traceback"),
    ],
)
def test_entry_point_exit(rank, error, status, said):
    script = SCRIPT.format(error=error)
    done = subprocess.run(
        [sys.executable, "-c", script], env={"RANK": rank, "PYTHONIOENCODING": "utf-8"}, capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stderr == said if status == 2 else done.stderr.startswith(said)


def test_torchrun_closes_with_the_error(tmp_path):
    """torchrun prints a page about a failed rank: its last lines must say what the user did wrong."""
    (tmp_path / "entry.py").write_text(SCRIPT.format(error="UserError('seed=x is refused', remedy='give a number')"))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "entry.py")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "error: seed=x is refused — give a number" in done.stderr.splitlines()
    *_, status, _, closing, _ = done.stderr.strip().splitlines()
    assert "exitcode  : 2" in status
    assert closing.endswith("error: seed=x is refused — give a number")


def test_every_key_says_what_it_is_for():
    assert not [key for key, field in dotted_fields() if not field.description]


def test_explain_gives_type_bounds_and_default():
    text = explain("rollout")
    assert "rollout.group_size: int, >= 2, default 8\n    Captions" in text
    assert "rollout.memory_fraction: float, > 0, < 1, default 0.6, may change when the run goes on" in text
    assert "algorithm.dual_clip: float | null, > 1, default null" in explain("algorithm.dual_clip")
    assert explain("rollout.top_p").count("default") == 1 and "rollout" not in explain("model")
    with pytest.raises(UserError, match=r"--explain rollout\.groupsize: no such"):
        explain("rollout.groupsize")
