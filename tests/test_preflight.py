"""What cannot work is refused before any work starts, naming the key, its value and the remedy."""

import json
from functools import partial

import pytest
import torch

from balcap_mega.config import preflight as checks
from balcap_mega.config.load import dump_config
from balcap_mega.config.schema import MAY_CHANGE, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from balcap_mega.errors import UserError
from balcap_mega.models.families import FAMILIES

check_model = partial(checks.check_model, families=FAMILIES)
preflight = partial(checks.preflight, families=FAMILIES)


@pytest.fixture
def run(tmp_path):
    """`run(section={...})` -> a config on top of a small valid one."""

    def run(**changes):
        base = {
            "output_dir": str(tmp_path / "run"),
            "model": {"tiny": "qwen2_5_vl"},
            "rollout": {"prompts_per_step": 8, "max_tokens": 64, "max_model_len": 512},
        }
        for section, keys in changes.items():
            base[section] = base.get(section, {}) | keys if isinstance(keys, dict) else keys
        return RunConfig.model_validate(base)

    return run


MLLM = {"judge": "mllm", "endpoint": {"base_url": "http://localhost:1", "model": "m"}}


def test_unknown_family_is_refused(run):
    with pytest.raises(UserError, match=r"model\.tiny=blip is no model family.*qwen2_5_vl, .*llava"):
        preflight(run(model={"tiny": "blip"}), 1)


def test_valid_run_passes(run):
    assert preflight(run(), world_size=2) is False
    assert preflight(run(parallel={"tensor": 2, "pipeline": 2}, rollout={"tensor_parallel": 2}), world_size=4) is False


REFUSED = {
    "layout": (dict(parallel={"tensor": 2, "pipeline": 2}), 6, ["parallel.tensor=2", "6 processes", "multiple of 4"]),
    "engine": (dict(rollout={"tensor_parallel": 4}), 6, ["rollout.tensor_parallel=4", "divisor of 6"]),
    "ranks": (dict(rollout={"prompts_per_step": 9}), 2, ["prompts_per_step=9", "size 2", "multiple of 2"]),
    "updates": (dict(optimizer={"updates_per_step": 3}), 1, ["updates_per_step=3", "multiple of 3"]),
    "replicas": (dict(parallel={"tensor": 4}, rollout={"prompts_per_step": 6}), 4, ["4 engines", "multiple of 4"]),
    "small data": (dict(data={"train_size": 4}), 1, ["prompts_per_step=8", "data.train_size=4"]),
    "lengths": (dict(rollout={"max_tokens": 512}), 1, ["max_tokens=512", "max_model_len=512"]),
    "row": (dict(packing={"row_tokens": 256}), 1, ["packing.row_tokens=256", "at least 512"]),
    "fp8": (dict(parallel={"device": "cpu"}, model={"fp8": "hybrid"}), 1, ["model.fp8=hybrid", "needs a GPU"]),
    "data": (
        dict(data={"source": "jsonl", "path": "/nowhere.jsonl"}, rewards=MLLM),
        1,
        ["data.path=/nowhere.jsonl", "No such file"],
    ),
    "images": (
        dict(data={"source": "jsonl", "path": __file__, "image_root": "/nowhere"}, rewards=MLLM),
        1,
        ["data.image_root=/nowhere"],
    ),
    "model": (dict(model={"tiny": None, "path": "/nowhere"}), 1, ["model.path=/nowhere", "config.json"]),
    "output": (dict(output_dir="/dev/null/run"), 1, ["output_dir=/dev/null/run"]),
}


@pytest.mark.parametrize("changes, world_size, said", REFUSED.values(), ids=REFUSED.keys())
def test_refused(run, changes, world_size, said):
    with pytest.raises(UserError) as caught:
        preflight(run(**changes), world_size)
    for words in said:
        assert words in str(caught.value)
    assert caught.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_a_gpu(run):
    with pytest.raises(UserError, match=r"parallel\.device=cuda"):
        preflight(run(parallel={"device": "cuda"}), 1)


def test_empty_data(run, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    data = {"source": "jsonl", "path": str(tmp_path / "empty.jsonl")}
    with pytest.raises(UserError, match="is empty"):
        preflight(run(data=data, rewards=MLLM), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_checkpoints_pass(tiny_checkpoint, family):
    model = ModelConfig(path=str(tiny_checkpoint(family)))
    check_model(model, ParallelConfig(tensor=2), RolloutConfig(max_tokens=64, max_model_len=512))


def checkpoint(folder, config, files=("model.safetensors", "tokenizer_config.json", "preprocessor_config.json")):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files:
        (folder / name).touch()
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    "config, parallel, rollout, said",
    [
        ("{", {}, {}, "not valid JSON"),
        ({"model_type": "blip"}, {}, {}, "'blip'.*qwen2_5_vl, .*llava"),
        ({}, {}, {}, "architecture None"),
        ([], {}, {}, "architecture None"),
        ({"model_type": "llava", "text_config": {"num_attention_heads": 6}}, {"tensor": 4}, {}, "parallel.tensor=4"),
        ({"model_type": "qwen2_5_vl", "num_hidden_layers": 3}, {"pipeline": 4}, {}, "model's 3 layers"),
        ({"model_type": "llava", "num_attention_heads": 6}, {}, {"tensor_parallel": 4}, "rollout.tensor_parallel=4"),
        ({"model_type": "llava", "max_position_embeddings": 1024}, {}, {}, "max_model_len=4096.*at most 1024"),
    ],
)
def test_model_refused(tmp_path, config, parallel, rollout, said):
    with pytest.raises(UserError, match=said):
        check_model(checkpoint(tmp_path, config), ParallelConfig(**parallel), RolloutConfig(**rollout))


@pytest.mark.parametrize(
    "files, said",
    [
        (["pytorch_model.bin", "tokenizer_config.json"], r"no \*\.safetensors"),
        (["model.safetensors", "tokenizer_config.json"], "lacks preprocessor_config.json"),
    ],
)
def test_incomplete_model_refused(tmp_path, files, said):
    with pytest.raises(UserError, match=said):
        check_model(checkpoint(tmp_path, {"model_type": "llava"}, files), ParallelConfig(), RolloutConfig())


def save(config, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))


def test_same_run_goes_on(run, tmp_path):
    save(run(), tmp_path)
    assert preflight(run(), 1) is True
    assert preflight(run(steps=5000, eval_every=7, checkpoint={"every": 3}), 1) is True
    changed = {"rewards": {"cache_dir": "elsewhere", "endpoint": MLLM["endpoint"]}, "rollout": {"timeout_seconds": 9}}
    assert preflight(run(**changed, parallel={"timeout_seconds": 9}, health={"non_finite": "skip"}), 1) is True


def test_what_a_run_may_change_is_marked_where_the_key_is_declared():
    marked = {name for name, field in RolloutConfig.model_fields.items() if MAY_CHANGE in field.metadata}
    assert marked == {"tensor_parallel", "timeout_seconds", "memory_fraction", "verify_refit_every"}


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(seed=1), "seed was 0 and is now 1"),
        (dict(rollout={"group_size": 4}), "rollout.group_size was 8 and is now 4"),
        (dict(algorithm={"weights": {"precision": 1.0}}), "algorithm.weights.recall was 1.0 and is now None"),
    ],
)
def test_another_run_is_refused(run, tmp_path, changes, said):
    save(run(), tmp_path)
    with pytest.raises(UserError, match=said):
        preflight(run(**changes), 1)


def test_folder_of_no_run_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    assert preflight(run(), 1) is False  # an empty folder is fine
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds files but no config\.yaml"):
        preflight(run(), 1)
