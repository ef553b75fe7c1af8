"""A run is its inputs: the same on every rank, the same when it goes on, and each place of a step its own captions."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.algorithm.words import count_words
from balcap_mega.config.schema import DataConfig, PackingConfig, RewardConfig, RunConfig
from balcap_mega.data.inputs import RunInputs
from balcap_mega.data.records import CaptionRecord
from balcap_mega.data.scenes import ScenesDataset
from balcap_mega.data.sources import build_datasets
from balcap_mega.diagnostics.inputs import NodeInputs, compare_inputs
from balcap_mega.errors import UserError
from balcap_mega.models.huggingface import fingerprint
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.rewards.factory import build_rewards
from balcap_mega.rollout.replicas import Replica
from balcap_mega.rollout.requests import request_seed
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.batches import BatchBuilder
from balcap_mega.training.folder import RunFolder
from balcap_mega.training.inputs import agreed_inputs, write_inputs
from balcap_mega.training.judging import Judging
from balcap_mega.training.prompts import Prompts
from tests.support.distributed import launch


def make_data(folder: Path, count: int = 12) -> DataConfig:
    """Rows of small pictures, each of its own colour."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(count):
            Image.new("RGB", (56, 56), (number, 99, 0)).save(folder / "images" / f"{number:02}.png")
            file.write(json.dumps({"image": f"{number:02}.png", "reference": f"Field {number}."}) + "\n")
    return DataConfig(
        source="jsonl", path=str(folder / "rows.jsonl"), image_root=str(folder / "images"), eval_size=4,
        max_missing_fraction=0.2,
    )  # fmt: skip


def append_rows(data: DataConfig, numbers: range) -> None:
    with open(data.path, "a") as file:
        for number in numbers:
            Image.new("RGB", (56, 56), (number, 99, 0)).save(Path(data.image_root) / f"{number:02}.png")
            file.write(json.dumps({"image": f"{number:02}.png", "reference": f"Field {number}."}) + "\n")


def ids(dataset) -> list[str]:
    return [row.id for row in dataset.rows]


@pytest.mark.parametrize("among", [None, 8])
def test_appended_rows_move_no_held_out_record(tmp_path, among):
    data = make_data(tmp_path).model_copy(update={"eval_among": among})
    train, held_out = build_datasets(data, seed=0)
    assert len(held_out) == 4 and (among is None) == (ids(held_out) == ["00.png", "01.png", "02.png", "03.png"])
    append_rows(data, range(12, 60))
    more, same = build_datasets(data, seed=0)
    assert ids(same) == ids(held_out) and ids(more)[:8] == ids(train) and len(more) == 56
    assert same.digest() == held_out.digest() and more.digest() != train.digest()


def outcome(function, *arguments) -> str:
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return "accepted"


def start(rank: int, data: DataConfig, model: Path, **keys) -> str:
    """What becomes of a start of the run in the first rank's folder."""
    config = RunConfig(
        output_dir=str(Path(data.path).parents[1] / "n0"), data=data, model={"path": str(model)},
        rollout={"prompts_per_step": 8},
        rewards={"judge": "mllm", "endpoint": {"base_url": "http://localhost:1", "model": "m"}}, **keys,
    )  # fmt: skip
    folder, (train, held_out) = RunFolder(Path(config.output_dir)), build_datasets(data, seed=0)

    def begin():
        inputs = agreed_inputs(config, folder, train, held_out)
        if rank == 0:
            write_inputs(folder, inputs)

    return outcome(begin)


def on_two_hosts(root: Path, model: Path) -> dict[str, str]:
    """Starts of a run, each rank on a host with files of its own."""
    rank = torch.distributed.get_rank()
    os.environ |= {"SLURMD_NODENAME": f"n{rank}", "LOCAL_RANK": "0"}
    own = shutil.copytree(model, root / f"model{rank}")
    data, said = make_data(root / f"n{rank}"), {}
    said["same"] = start(rank, data, own)
    said["again"] = start(rank, data, own)

    # A trainer whose picture of record 5 is another one.
    train, _ = build_datasets(data, seed=0)
    if rank:
        Image.new("RGB", (56, 56), "white").save(Path(data.image_root) / train.rows[5].image)
    prompts, replica = Prompts(train, [1, 2, 5, 7]), Replica(rank, 2, 0)
    captions = (Rollout((3, 4), (-1.0, -1.0), "", True),) * 2
    processor = PromptProcessor(own)
    groups = replica.gather([
        RolloutGroup(r.place, processor(r.record).prompt_token_ids, captions, SeenRecord.of(r.record_index, r.record))
        for r in prompts.of(replica)
    ])  # fmt: skip
    config = PackingConfig(row_tokens=1024)
    builder = BatchBuilder(processor, config, ProcessGrid(0, 1, 0, 1, 0, 1), hidden_size=64, pad_to=1)
    advantages = Advantages(torch.ones(8), torch.ones(1, 8), torch.zeros(8, dtype=torch.bool))
    said["pixels"] = outcome(builder.from_rollouts, prompts, groups, advantages, 1)

    # One image of one host is gone; then one of its rows is another.
    (Path(data.image_root) / "08.png").rename(root / f"gone{rank}.png") if rank else None
    said["image"] = start(rank, data, own)
    (root / f"gone{rank}.png").rename(Path(data.image_root) / "08.png") if rank else None
    if rank:
        text = Path(data.path).read_text()
        Path(data.path).write_text(text.replace("Field 9.", "Meadow."))
    said["row"] = start(rank, data, own)
    if rank:
        Path(data.path).write_text(text)
        (own / "chat_template.jinja").write_text("other")
    said["model"] = start(rank, data, own)
    if rank:
        shutil.copytree(model, own, dirs_exist_ok=True)

    # The data grows on both hosts, then the checkpoint becomes another.
    append_rows(data, range(12, 20))
    said["grown"] = start(rank, data, own)
    said["accepted"] = start(rank, data, own, accept_changed=("rows",))
    said["once"] = start(rank, data, own)
    weights = own / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    said["other weights"] = start(rank, data, own)
    weights.write_bytes(weights.read_bytes()[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    said["fewer held out"] = start(rank, data.model_copy(update={"eval_among": 20}), own)
    said["few"] = start(rank, data.model_copy(update={"train_size": 7}), own)
    return said


def test_a_run_is_its_inputs_on_every_host_and_whenever_it_goes_on(tiny_checkpoint, tmp_path):
    said = launch(2, on_two_hosts, tmp_path, tiny_checkpoint("qwen2_5_vl"))
    assert all(each["same"] == each["again"] == each["accepted"] == each["once"] == "accepted" for each in said)
    assert said[0]["pixels"] == "accepted", "it drew the captions of record 5 itself"
    assert "rank 0 on n0 and rank 1 on n1 do not load the same data: record 5 is '09.png'" in said[1]["pixels"]
    for name, *words in (
        ("image", "rank 0 on n0 and rank 1 on n1", "8 rows to train on and 7", "'08.png' is missing on rank 1 on n1"),
        ("row", "rank 0 on n0 and rank 1 on n1", "8 rows to train on and as many others"),
        ("model", "rank 0 on n0 and rank 1 on n1", "other content at model.path"),
        ("grown", "8 rows to train on and 16", "another output_dir", "accept_changed=[rows]"),
        ("other weights", "other content at model.path", "bring model.path back", "accept_changed=[checkpoint]"),
        ("fewer held out", "4 held-out rows and as many others", "another output_dir"),
        ("few", "rollout.prompts_per_step=8 exceeds the 7 records"),
    ):
        assert said[0][name] == said[1][name], "all ranks end alike"
        for word in words:
            assert word in said[0][name], (name, said[0][name])
    assert "accept_changed" not in said[0]["fewer held out"]


def test_the_doctor_compares_hosts(tmp_path):
    read = []
    for node in ("n0", "n1"):
        data = make_data(tmp_path / node)
        read.append(NodeInputs(node, RunInputs.of(*build_datasets(data, seed=0)), ()))
    assert compare_inputs(read).status == "ok"
    (Path(data.image_root) / "08.png").unlink()
    train, held_out = build_datasets(data, seed=0)
    finding = compare_inputs([read[0], NodeInputs("n1", RunInputs.of(train, held_out), train.absent)])
    assert finding.status == "FAIL" and "n0 and n1 differ" in finding.detail and "'08.png' is missing" in finding.detail


@pytest.mark.parametrize("sampled", [False, True])
def test_every_tensor_and_small_file_counts_in_a_checkpoints_digest(tmp_path, monkeypatch, sampled):
    """Whole, and as a folder that is too large to be read whole."""
    if sampled:
        monkeypatch.setattr(fingerprint, "WHOLE", 0)
    tensors = {name: torch.zeros(size) for name, size in (("small", 3), ("large", 100_000), ("other", 20_000))}

    def digest(changed: str = "", config: str = "{}") -> str:
        values = {name: tensor + (name == changed) for name, tensor in tensors.items()}
        save_file(values, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(config)
        (tmp_path / "README.md").write_text(changed)
        return fingerprint.checkpoint_digest(tmp_path)

    assert digest() == digest()
    assert len({digest(), digest("small"), digest("large"), digest("other"), digest(config="{ }")}) == 5
    (tmp_path / "model.safetensors").write_bytes((2**40).to_bytes(8, "little"))
    if sampled:
        with pytest.raises(UserError, match="not a whole safetensors"):
            fingerprint.checkpoint_digest(tmp_path)


def test_a_record_that_a_step_has_twice_gets_a_seed_and_a_judgement_for_each_place():
    """Its first place keeps the seed of a step that has it once, whichever engine draws it."""
    dataset = ScenesDataset(5, seed=0, split="train")
    prompts = Prompts(dataset, [4, 2, 4, 4])
    halves = [prompts.of(Replica(index, 2, 0)) for index in range(2)]
    mine = sorted([*halves[0], *halves[1]], key=lambda prompt: prompt.place)
    assert [(p.place, p.record_index, p.repeat) for p in mine] == [(0, 4, 0), (1, 2, 0), (2, 4, 1), (3, 4, 2)]
    assert mine == list(prompts.of(Replica(0, 1, 0)))
    seeds = [request_seed(0, 7, prompt.record_index, prompt.repeat) for prompt in mine]
    assert len(set(seeds)) == 4 and seeds[:2] == [request_seed(0, 7, 4), request_seed(0, 7, 2)]

    judging = Judging(build_rewards(RewardConfig()), prompts, count_words, timeout_seconds=60)
    texts = [record.reference for record in (dataset[4], dataset[2], dataset[0])] + ["Nothing."]
    groups = []
    for prompt, text in zip(mine, texts, strict=True):
        rollout = Rollout((1,), (-1.0,), text, True)
        judging.submit(prompt.place, 0, rollout)
        groups.append(RolloutGroup(prompt.place, (1,), (rollout,), SeenRecord.of(prompt.record_index, prompt.record)))
    scores = [caption.score.components["recall"] for _, [caption] in judging.scored(groups)]
    assert scores[0] == 1.0 and scores[1] == 1.0 and scores[2] < 1.0 and scores[3] == 0.0


def test_other_pixels_are_refused_by_both_hosts_names():
    record = CaptionRecord("a", Image.new("RGB", (8, 6), "green"), "Describe.", "A field.")
    here, there = (
        replace(SeenRecord.of(3, record), by="rank 0 on n0"),
        replace(SeenRecord.of(3, record), by="rank 1 on n1"),
    )
    here.refuse_unlike(there)
    for other in ("red", "green"):
        picture = Image.new("RGB", (6, 8) if other == "green" else (8, 6), other)
        changed = replace(SeenRecord.of(3, replace(record, image=picture)), by="rank 1 on n1")
        with pytest.raises(UserError, match=r"rank 0 on n0 and rank 1 on n1 .* record 3 is 'a' with other pixels"):
            here.refuse_unlike(changed)
    with pytest.raises(UserError, match="'a' here and 'b' there"):
        here.refuse_unlike(replace(there, id="b"))
