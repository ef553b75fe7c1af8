"""Checkpoints of both families into the policy and back out at several layouts; bad checkpoints refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from balcap_mega.config.schema import ModelConfig, ParallelConfig, RolloutConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.files import check_checkpoint
from balcap_mega.models.huggingface.transfer import export_checkpoint, import_checkpoint
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.engine import RolloutEngine
from tests.support.distributed import launch
from tests.support.policy_cases import expected_shard
from tests.support.rollout_cases import largest_difference, make_prompts

SHARD_BYTES = 200_000
LAYOUTS = ({"tensor": 1}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}, {"tensor": 4})


def exported_name(layout: dict) -> str:
    return f"tensor{layout.get('tensor', 1)}_pipeline{layout.get('pipeline', 1)}"


def round_trips(folders: list[Path], targets: list[Path], layouts: tuple[dict, ...]) -> None:
    """On one rank: import every checkpoint at every layout, compare with transformers' tensors, export again."""
    platform = Platform.resolve("cpu")
    states = [AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in folders]
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        initialize_parallel(parallel, platform)
        for folder, target, state in zip(folders, targets, states, strict=True):
            config = ModelConfig(path=str(folder), dtype="float32")
            policy = build_policy(Architecture.from_folder(folder), config, parallel, platform)
            for parameter in policy.parameters():
                parameter.data.fill_(float("nan"))
            import_checkpoint(folder, policy)
            for name, parameter in policy.named_parameters():
                assert torch.equal(parameter, expected_shard(policy, name, parameter, state)), (layout, folder, name)
            export_checkpoint(policy, folder, target / exported_name(layout), shard_bytes=SHARD_BYTES)
            with pytest.raises(UserError, match="exists already"):
                export_checkpoint(policy, folder, target / exported_name(layout))
        destroy_parallel()


CASES = {
    "qwen2_5_vl one kv head": {"text_config": {"num_key_value_heads": 1}},
    "qwen2_5_vl tied": {"tie_word_embeddings": True, "text_config": {"num_hidden_layers": 3}},
    "qwen3_vl": {"text_config": {"num_hidden_layers": 4}},
    "llava": {"text_config": {"num_hidden_layers": 3}},
}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Each case's source folder and the folder of its exports, one for each layout."""
    sources, targets = {}, {case: tmp_path_factory.mktemp("exports") for case in CASES}
    for case, options in CASES.items():
        sources[case] = copy(tiny_checkpoint(case.split()[0], **options), tmp_path_factory.mktemp("sources"))
        edit(sources[case], randomize_vectors)
    launch(4, round_trips, list(sources.values()), list(targets.values()), LAYOUTS)
    return {case: (sources[case], targets[case]) for case in CASES}


def copy(folder: Path, parent: Path) -> Path:
    return Path(shutil.copytree(folder, parent / "checkpoint"))


def edit(folder: Path, change) -> None:
    """Rewrite the weights with `change(tensors)` applied."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def randomize_vectors(tensors: dict[str, torch.Tensor]) -> None:
    """Norms and biases start out alike: tell them apart."""
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = torch.randn_like(tensor)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact_for_transformers(case, exported):
    source, target = exported[case]
    expected = AutoModelForImageTextToText.from_pretrained(source).state_dict()
    for layout in LAYOUTS:
        model, report = AutoModelForImageTextToText.from_pretrained(
            target / exported_name(layout), output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"], report
        assert model.state_dict().keys() == expected.keys()
        for name, value in model.state_dict().items():
            assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), (layout, name)


def differences_of_vllm(pairs: list[tuple[Path, Path]]) -> list[float]:
    """Largest difference between vLLM's logprobs from each export and those of transformers from its source."""
    worst = []
    for source, exported in pairs:
        config = RolloutConfig(group_size=2, max_tokens=8, max_model_len=512)
        engine = RolloutEngine(exported, config, device=torch.device("cpu"), dtype=torch.float32, seed=0)
        prompts = make_prompts(2)
        model = AutoModelForImageTextToText.from_pretrained(source)
        worst.append(largest_difference(model, source, engine, prompts, engine.sample(prompts, step=0)))
    return worst


def test_vllm_serves_what_was_exported(exported):
    layout = exported_name({"tensor": 2, "pipeline": 2})
    [worst] = launch(1, differences_of_vllm, [(source, target / layout) for source, target in exported.values()])
    assert max(worst) < 1e-4, dict(zip(exported, worst, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_exported_folder_is_whole_and_in_bounded_shards(case, exported):
    source, target = exported[case]
    for layout in LAYOUTS:
        folder = target / exported_name(layout)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = sorted(set(index["weight_map"].values()))
        assert len(files) > 1 and sorted(path.name for path in folder.glob("*.safetensors")) == files
        sizes = {}
        for file in files:
            tensors = load_file(folder / file)
            assert tensors.keys() == {name for name, owner in index["weight_map"].items() if owner == file}
            sizes[file] = [value.nbytes for value in tensors.values()]
            assert sum(sizes[file]) <= SHARD_BYTES or len(tensors) == 1
        assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
        assert not list(target.glob("*.partial"))
        assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
        for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    return copy(tiny_checkpoint("qwen2_5_vl"), tmp_path)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(DOWN), f"1 missing: {DOWN}"),
        (lambda tensors: tensors.update(adapter=torch.zeros(2)), "1 unexpected: adapter"),
        (
            lambda tensors: tensors.update({DOWN: torch.zeros(128, 128)}),
            rf"{DOWN} \[128, 128\] instead of \[128, 256\]",
        ),
        (lambda tensors: tensors.update({DOWN: torch.zeros(128, 256, dtype=torch.int8)}), rf"{DOWN} \(I8\)"),
        (lambda tensors: tensors.update({"model.language_model.norm.weight": torch.ones(128)}), "are the same tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, checkpoint):
    edit(checkpoint, change)
    with pytest.raises(UserError, match=message):
        check_checkpoint(checkpoint, Architecture.from_folder(checkpoint))


def test_broken_folders_are_refused(checkpoint, tiny_checkpoint):
    architecture = Architecture.from_folder(checkpoint)
    with pytest.raises(UserError, match=r"97 missing: vision_tower.*80 unexpected: model\.embed"):
        check_checkpoint(checkpoint, Architecture.from_folder(tiny_checkpoint("llava")))
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        check_checkpoint(checkpoint, architecture)
    weights.unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        check_checkpoint(checkpoint, architecture)
    index = checkpoint / "model.safetensors.index.json"
    for content, message in (
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "lacks one.safetensors, two.safetensors"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "outside its folder"),
        ("[]", "not a safetensors index"),
        ("{", "not a safetensors index"),
    ):
        index.write_text(content)
        with pytest.raises(UserError, match=message):
            check_checkpoint(checkpoint, architecture)


def test_old_checkpoints_import(checkpoint):
    """Constants beside the weights, and a stored copy of a tied head, are passed over."""
    tie(checkpoint)
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}))
    edit(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    stored = check_checkpoint(checkpoint, Architecture.from_folder(checkpoint))
    assert "lm_head.weight" not in stored


def test_another_head_beside_tied_embeddings_is_refused(checkpoint):
    """transformers, and vLLM likewise, take the stored head there; untied by the remedy, all three agree on it."""
    tie(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    with pytest.raises(UserError, match=r"lm_head\.weight is stored and is not the embedding.*tie_word_embeddings"):
        check_checkpoint(checkpoint, Architecture.from_folder(checkpoint))
    tie(checkpoint, False)
    assert "lm_head.weight" in check_checkpoint(checkpoint, Architecture.from_folder(checkpoint))


def tie(folder: Path, tied: bool = True) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    path.write_text(json.dumps(config))
