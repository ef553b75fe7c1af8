"""Run checkpoints: bit-exact at one layout, loadable at another, never half there, pruned, verified."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import threading
from collections import defaultdict
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing

from balcap_mega.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from balcap_mega.errors import UserError
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.huggingface.mapping import megatron_blocks
from balcap_mega.models.huggingface.transfer import import_checkpoint
from balcap_mega.models.policy import build_policy
from balcap_mega.parallel.gradients import build_optimizer, wrap_ddp
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel, process_grid
from balcap_mega.parallel.platform import Platform
from balcap_mega.planning.memory import checkpoint_bytes
from balcap_mega.planning.parameters import ParameterCounts
from balcap_mega.training.checkpoint.format import latest_checkpoint, load_checkpoint
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from tests.support.checkpoints import allocated, gathered_state, gathering
from tests.support.distributed import launch

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=1e9)


class Learner:
    """A policy, its optimizer, and updates along gradients drawn for the whole model: the same at every layout."""

    def __init__(self, folder: Path, parallel: ParallelConfig, dtype: str = "bfloat16", freeze_vision: bool = True):
        self.platform = Platform.resolve("cpu")
        initialize_parallel(parallel, self.platform)
        config = ModelConfig(path=str(folder), dtype=dtype, freeze_vision=freeze_vision)
        self.policy = build_policy(Architecture.from_folder(folder), config, parallel, self.platform)
        import_checkpoint(folder, self.policy)
        layout = process_grid()
        self.blocks = megatron_blocks(
            self.policy.architecture,
            tensor_rank=layout.tensor_rank,
            tensor_size=layout.tensor_size,
            pipeline_rank=layout.pipeline_rank,
            pipeline_size=layout.pipeline_size,
        )
        with self.platform.megatron():
            self.model = wrap_ddp(self.policy, parallel)
            self.optimizer = build_optimizer(self.model, OPTIMIZER, parallel)

    def update(self, seed: int) -> None:
        """One optimizer step; `seed` gives each Hugging Face tensor its gradient."""
        parameters = dict(self.policy.named_parameters())
        with self.platform.megatron():
            self.model.zero_grad_buffer()
            for block in self.blocks:
                parameter = parameters[block.parameter]
                if not parameter.requires_grad:
                    continue
                gradient = parameter.main_grad.view(parameter.shape[0], -1)
                rows, cols = (torch.arange(*span, dtype=torch.float32) for span in (block.hf_rows, block.hf_cols))
                phase = len(block.hf_name) + 31 * seed
                gradient[slice(*block.rows), slice(*block.cols)] = torch.sin(rows[:, None] * 0.7 + cols * 0.3 + phase)
            self.optimizer.step()

    def weights(self) -> dict[tuple, np.ndarray]:
        """This rank's rectangles of the Hugging Face tensors, by name, rows and columns."""
        parameters = {name: value.detach().view(value.shape[0], -1) for name, value in self.policy.named_parameters()}
        return {
            (block.hf_name, block.hf_rows, block.hf_cols): parameters[block.parameter][
                slice(*block.rows), slice(*block.cols)
            ]
            .float()
            .numpy()
            for block in self.blocks
        }

    def writer(self, folder: Path, keep: int = 2) -> CheckpointWriter:
        return CheckpointWriter(folder, self.platform, keep=keep, timeout_seconds=60)

    def start(self, writer: CheckpointWriter, step: int) -> None:
        writer.start(step, self.model, self.optimizer, {"step": step})

    def load(self, path: Path) -> dict:
        with self.platform.megatron():
            return load_checkpoint(path, self.model, self.optimizer)


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@dataclass(frozen=True)
class Outcome:
    """Weights at the checkpoint and after one more update, and random numbers drawn right after the checkpoint.

    host_bytes: what taking or loading the checkpoint allocated on this rank, at its peak
    """

    saved: dict[tuple, np.ndarray]
    after: dict[tuple, np.ndarray]
    drawn: list[float]
    host_bytes: int


def save_and_go_on(folder: Path, target: Path, layout: dict) -> Outcome:
    learner = Learner(folder, ParallelConfig(**layout))
    learner.update(0)
    learner.update(1)
    draw()
    writer = learner.writer(target, keep=1)
    host_bytes = allocated(lambda: learner.start(writer, 2))
    saved, drawn = deepcopy(learner.weights()), draw()
    learner.update(2)  # training goes on before the checkpoint is whole
    writer.finish()
    destroy_parallel()
    return Outcome(saved, learner.weights(), drawn, host_bytes)


def save_gathered(folder: Path, target: Path, layout: dict) -> int:
    """Save one state in shares and as Megatron gathers it, and have Megatron read both alike; return the peak bytes."""
    learner = Learner(folder, ParallelConfig(**layout))
    learner.update(0)
    learner.update(1)
    shared, gathered = learner.writer(target / "shared"), learner.writer(target / "gathered")
    learner.start(shared, 2)
    shared.finish()
    with gathering():
        host_bytes = allocated(lambda: learner.start(gathered, 2))
        gathered.finish()
    found = []
    for path in (target / "shared", target / "gathered"):
        with learner.platform.megatron():
            state, _ = gathered_state(learner.model, learner.optimizer, is_loading=True)
            loaded = dist_checkpointing.load(state, str(latest_checkpoint(path) / "megatron"))
        found.append(loaded["optimizer"]["param_state"])
    for index, tensors in found[1].items():
        assert tensors.keys() == {"param", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(tensor, found[0][index][name]) for name, tensor in tensors.items())
    destroy_parallel()
    return host_bytes


def resume_and_go_on(folder: Path, target: Path, layout: dict) -> Outcome:
    learner = Learner(folder, ParallelConfig(**layout))
    learner.update(5)  # whatever was there before is replaced
    extra = {}
    host_bytes = allocated(lambda: extra.update(learner.load(latest_checkpoint(target))))
    assert extra == {"step": 2}
    saved, drawn = deepcopy(learner.weights()), draw()
    learner.update(2)
    destroy_parallel()
    return Outcome(saved, learner.weights(), drawn, host_bytes)


TIED = {"family": "qwen2_5_vl", "tie_word_embeddings": True, "text_config": {"num_hidden_layers": 3}}
LLAVA = {"family": "llava", "text_config": {"num_hidden_layers": 3}}
BUCKETS = {"tensor": 1, "overlap_grad_reduce": True, "bucket_size": 60_000}  # about nine of them
# Which checkpoint is saved at which layout, and at which ones it is resumed.
CASES = (
    (TIED, {"tensor": 2, "pipeline": 2}, ({"tensor": 2, "pipeline": 2}, {"tensor": 4}, {"pipeline": 2})),
    (LLAVA, BUCKETS, (BUCKETS, {"tensor": 2, "pipeline": 2})),
    (LLAVA, {"tensor": 2, "distributed_optimizer": False}, ({"tensor": 2, "distributed_optimizer": False},)),
)


GATHERED = 1  # the case whose checkpoint is also written as Megatron gathers it


@dataclass(frozen=True)
class Results:
    """Of one rank: each case as it was saved and resumed; the case GATHERED as Megatron gathers it, and from that.

    gathering_bytes: what gathering allocated, at its peak
    """

    cases: list[tuple[Outcome, list[Outcome]]]
    gathering_bytes: int
    from_gathered: Outcome


def all_cases(folders: list[Path], target: Path) -> Results:
    cases = []
    for index, (folder, (_, saving, loading)) in enumerate(zip(folders, CASES, strict=True)):
        before = save_and_go_on(folder, target / str(index), saving)
        cases.append((before, [resume_and_go_on(folder, target / str(index), layout) for layout in loading]))
    folder, (_, saving, loading) = folders[GATHERED], CASES[GATHERED]
    gathering = save_gathered(folder, target, saving)
    return Results(cases, gathering, resume_and_go_on(folder, target / "gathered", loading[-1]))


def whole(ranks: list[dict[tuple, np.ndarray]]) -> dict[str, np.ndarray]:
    """Hugging Face tensors put together from all ranks' rectangles, which agree where they overlap."""
    extents = defaultdict(lambda: (0, 0))
    for name, rows, cols in (key for rank in ranks for key in rank):
        extents[name] = max(extents[name][0], rows[1]), max(extents[name][1], cols[1])
    tensors = {name: np.full(extent, np.nan, dtype=np.float32) for name, extent in extents.items()}
    for rank in ranks:
        for (name, rows, cols), value in rank.items():
            part = tensors[name][slice(*rows), slice(*cols)]
            assert np.isnan(part).any() or np.array_equal(part, value), name
            part[:] = value
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], what) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(actual[name], expected[name]), (what, name)


@pytest.fixture(scope="module")
def by_rank(tiny_checkpoint, tmp_path_factory) -> list[Results]:
    folders = [tiny_checkpoint(**options) for options, _, _ in CASES]
    return launch(4, all_cases, folders, tmp_path_factory.mktemp("checkpoints"))


def test_resume_is_bit_exact_at_any_layout(by_rank):
    """Gradients are given, so that even another layout's next update must not differ in a single bit."""
    for case, (_, saving, loading) in enumerate(CASES):
        before = [results.cases[case][0] for results in by_rank]
        saved, after = whole([rank.saved for rank in before]), whole([rank.after for rank in before])
        assert any(not np.array_equal(saved[name], after[name]) for name in saved)
        for index, layout in enumerate(loading):
            resumed = [results.cases[case][1][index] for results in by_rank]
            assert_equal(whole([rank.saved for rank in resumed]), saved, layout)
            assert_equal(whole([rank.after for rank in resumed]), after, layout)
            if layout == saving:
                assert [rank.drawn for rank in resumed] == [rank.drawn for rank in before]
        if case == GATHERED:
            resumed = [results.from_gathered for results in by_rank]
            assert_equal(whole([rank.saved for rank in resumed]), saved, "gathered")
            assert_equal(whole([rank.after for rank in resumed]), after, "gathered")


MESSAGES = 2**18  # bytes: what ranks tell each other of tensors, whatever these hold


def test_no_rank_holds_more_of_a_checkpoint_than_its_share(by_rank, tiny_checkpoint):
    """Of 12 bytes a trained parameter, and as the planner says; gathered, the first of four ranks held it all."""
    [parameters] = ParameterCounts(Architecture.from_folder(tiny_checkpoint(**LLAVA))).stages(1, 1)
    most = 1.3 * 12 * parameters.language / 4 + MESSAGES
    saving = [results.cases[GATHERED][0].host_bytes for results in by_rank]
    loading = [resumed.host_bytes for results in by_rank for resumed in results.cases[GATHERED][1]]
    assert max(saving + loading) < most
    assert max(saving) == pytest.approx(checkpoint_bytes(parameters.total, parameters.language, 4), rel=0.1)
    assert max(results.gathering_bytes for results in by_rank) > 4 * most


def save_three(folder: Path, target: Path) -> None:
    learner = Learner(folder, ParallelConfig())
    writer = learner.writer(target)
    for step in (1, 2, 3):
        learner.update(step)
        learner.start(writer, step)
    writer.finish()
    destroy_parallel()


def loads(folder: Path, target: Path, options: dict) -> str | dict:
    """What loading the latest checkpoint gives: its extra values, or the message of the UserError."""
    learner = Learner(folder, ParallelConfig(), **options)
    try:
        return learner.load(latest_checkpoint(target))
    except UserError as error:
        return str(error)
    finally:
        destroy_parallel()


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    yield
    torch.distributed.destroy_process_group()


@contextmanager
def slow_disk():
    """Files written by another thread than this one reach the disk when the `with` ends."""
    sync, synced, main = os.fsync, threading.Event(), threading.get_ident()

    def slow_sync(handle):
        if threading.get_ident() != main:
            assert synced.wait(60)
        sync(handle)

    os.fsync = slow_sync
    try:
        yield
    finally:
        synced.set()
        os.fsync = sync


def test_training_goes_on_while_a_checkpoint_is_written(tiny_checkpoint, tmp_path, one_rank):
    """It holds the weights of the moment it was begun, and nobody sees it before it is whole."""
    folder = tiny_checkpoint("llava")
    learner = Learner(folder, ParallelConfig(distributed_optimizer=False))  # whose state Megatron does not copy
    learner.update(1)
    writer = learner.writer(tmp_path)
    with slow_disk():
        learner.start(writer, 1)
        begun = deepcopy(learner.weights())
        learner.update(2)
        writer.poll()
        assert latest_checkpoint(tmp_path) is None and writer.last == 0
        gone_on = deepcopy(learner.weights())
    writer.finish()
    assert writer.last == 1
    learner.load(latest_checkpoint(tmp_path))
    assert_equal(whole([learner.weights()]), whole([begun]), "when begun")
    learner.update(2)
    assert_equal(whole([learner.weights()]), whole([gone_on]), "gone on")
    destroy_parallel()


@pytest.fixture
def small_disk(tmp_path):
    """A disk that two checkpoints of the tiny model fill."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system can be mounted only by root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_full_disk_leaves_the_last_good_checkpoint(tiny_checkpoint, small_disk, one_rank):
    folder = tiny_checkpoint("llava")
    learner = Learner(folder, ParallelConfig())
    writer = learner.writer(small_disk)
    learner.update(1)
    learner.start(writer, 1)
    writer.finish()
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "others"
    for room in (100_000, 0):  # in the middle of the weights; before the first file
        filler.write_bytes(bytes(free - room))
        with pytest.raises(
            UserError, match=r"checkpoint of step 2 could not.*No space left on device.*goes on from step 1"
        ):
            learner.start(writer, 2)
            writer.finish()
        assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "others", "step_000001"]
    destroy_parallel()
    assert loads(folder, small_disk, {}) == {"step": 1}
    filler.unlink()


class Foreign:
    def __reduce__(self):
        return os.system, ("true",)


def test_only_whole_and_genuine_checkpoints_are_resumed(tiny_checkpoint, tmp_path, one_rank):
    folder = tiny_checkpoint("qwen2_5_vl")
    save_three(folder, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002", "step_000003"]
    assert loads(folder, tmp_path, {}) == {"step": 3}
    assert "of another model" in loads(folder, tmp_path, {"freeze_vision": False})
    assert "of another model" in loads(tiny_checkpoint("llava"), tmp_path, {})

    (tmp_path / "step_000004.tmp").mkdir()  # a save that was killed
    (tmp_path / "step_000005").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000003"
    shard = next((tmp_path / "step_000003" / "megatron").glob("*.distcp"))
    whole_bytes = shard.read_bytes()
    shard.write_bytes(whole_bytes[:-1])  # truncated
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000002"
    shard.write_bytes(whole_bytes[:-1] + bytes([whole_bytes[-1] ^ 1]))  # of the right size, one bit off
    assert f"megatron/{shard.name} is not as it was written" in loads(folder, tmp_path, {})
    shard.write_bytes(whole_bytes)

    index = tmp_path / "step_000003" / "megatron" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    [(_, stored), *_] = metadata.storage_data.items()
    extra_state = io.BytesIO()  # a layer's, which torch reads with `weights_only=False`
    torch.save(Foreign(), extra_state, _use_new_zipfile_serialization=False)
    assert stored.offset == 0 and extra_state.tell() < stored.length
    forge(shard, extra_state.getvalue() + whole_bytes[extra_state.tell() :])
    assert f"{shard.name} refers to posix.system" in loads(folder, tmp_path, {})
    forge(shard, whole_bytes)

    common = index.with_name("common.pt")
    whole_common, values = common.read_bytes(), torch.load(common, weights_only=True)
    values["optimizer"].clear()
    torch.save(values, common)
    forge(common, common.read_bytes())
    assert "its parts do not go together (KeyError: 'optimizer')" in loads(folder, tmp_path, {})
    forge(common, whole_common)
    metadata.storage_data.popitem()  # of numbers and names alone, as it should be, and one too few
    forge(index, pickle.dumps(metadata))
    assert "its parts do not go together (KeyError: " in loads(folder, tmp_path, {})
    forge(index, pickle.dumps(Foreign()))
    assert ".metadata refers to posix.system" in loads(folder, tmp_path, {})
    assert latest_checkpoint(tmp_path / "nowhere") is None


def forge(file: Path, content: bytes) -> None:
    """Replace a file of a checkpoint, and its digest in the manifest."""
    file.write_bytes(content)
    manifest_path = file.parent.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    name = str(file.relative_to(manifest_path.parent))
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_path.write_text(json.dumps(manifest))
