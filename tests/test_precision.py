"""Precision of gradients and moments, their reduction behind the backward pass, fused kernels: what each computes."""

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from packaging.version import Version

from balcap_mega.config.load import load_config
from balcap_mega.config.preflight import NEEDS_GPU, check_device
from balcap_mega.config.schema import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig
from balcap_mega.errors import UserError
from balcap_mega.models import fusions
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.master_weights import joined, split
from balcap_mega.parallel.platform import Platform
from balcap_mega.planning.hardware import Cluster
from balcap_mega.planning.layout import Layout
from balcap_mega.planning.optimizer import OptimizerBytes
from balcap_mega.planning.plan import Planner
from balcap_mega.training.checkpoint.format import latest_checkpoint, load_checkpoint
from balcap_mega.training.checkpoint.writer import CheckpointWriter
from balcap_mega.training.learner import Learner
from tests.support.distributed import launch
from tests.test_fp8 import WIDE
from tests.test_learner import make_batch
from tests.test_planning import recipe

CPU = Platform(torch.device("cpu"), "gloo")
UPDATES = 3
PRECISE = {"optimizer.precision_aware": "true"}
NARROW = PRECISE | {"optimizer.exp_avg_dtype": "bfloat16", "optimizer.exp_avg_sq_dtype": "bfloat16"}


# What is refused


@pytest.fixture
def load(tmp_path):
    """Reads a small run with these keys."""
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nmodel: {{tiny: qwen2_5_vl}}\n")
    return lambda keys: load_config(tmp_path / "run.yaml", [f"{key}={value}" for key, value in keys.items()])


def remedied(keys: dict, error: UserError) -> dict:
    """`keys`, with all that the error's remedy sets: its last alternative."""
    words = error.remedy.replace(",", " ").split(" or ")[-1].split()
    return keys | dict(word.split("=") for word in words if "=" in word and ">" not in word)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parallel.bucket_size": 5}, "parallel: bucket_size=5"),
        ({"parallel.overlap_grad_reduce": "true", "model.freeze_vision": "false"}, "without an image"),
        ({"optimizer.main_grads_dtype": "bfloat16", "model.dtype": "float32"}, "main_grads_dtype=bfloat16"),
        (PRECISE | {"model.dtype": "float32"}, "precision_aware=true"),
        (PRECISE | {"parallel.distributed_optimizer": "false"}, "needs the distributed"),
        ({"optimizer.exp_avg_dtype": "bfloat16"}, "exp_avg_dtype=bfloat16 needs"),
        ({"model.apply_rope_fusion": "true", "model.dtype": "float32"}, "apply_rope_fusion=true"),
        ({"model.gradient_accumulation_fusion": "true", "model.dtype": "float32"}, "accumulation_fusion=true"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_with_a_way_out(load, keys, said):
    with pytest.raises(UserError) as caught:
        load(keys)
    assert said in caught.value.problem
    load(remedied(keys, caught.value))


@pytest.mark.parametrize(
    "keys",
    [
        NARROW,
        {"model.apply_rope_fusion": "true", "model.gradient_accumulation_fusion": "true"},
        {"model.fp8": "hybrid", "rollout.fp8": "true"} | NARROW,
    ],
)
def test_what_needs_a_gpu_is_refused_on_a_cpu_with_a_way_out(load, keys):
    keys = keys | {"parallel.device": "cpu"}
    with pytest.raises(UserError, match="needs a GPU") as caught:
        check_device(load(keys))
    check_device(load(remedied(keys, caught.value)))
    assert set(NEEDS_GPU) >= set(keys) - {"parallel.device"}


@pytest.mark.parametrize("engine", [None, "2.8.0", "2.12.0", "2.11.0"])
def test_what_needs_transformer_engine_is_refused_without_a_fitting_one(load, monkeypatch, engine):
    monkeypatch.setattr(fusions, "transformer_engine_version", lambda: engine and Version(engine))
    plain = load({})
    fusions.check_fusions(plain.model, plain.optimizer)
    for keys in (NARROW, {"model.apply_rope_fusion": "true"}, {"model.gradient_accumulation_fusion": "true"}):
        config = load(keys)
        if engine == "2.11.0":
            fusions.check_fusions(config.model, config.optimizer)
            continue
        with pytest.raises(UserError, match="needs Transformer Engine") as caught:
            fusions.check_fusions(config.model, config.optimizer)
        without = load(remedied(keys, caught.value))
        fusions.check_fusions(without.model, without.optimizer)


def test_a_bfloat16_moment_can_follow_every_decay_that_is_accepted():
    """A moment whose gradients have ended must fall, whatever it is; it does not where the schema says so."""
    values = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # all between 1 and 2
    for beta, accepted in ((0.9, True), (0.996, True), (0.997, False), (0.999, False)):
        assert bool(((values.float() * beta).bfloat16() < values).all()) == accepted
        for betas, key in (((beta, 0.95), "exp_avg_dtype"), ((0.9, beta), "exp_avg_sq_dtype")):
            if accepted:
                OptimizerConfig(precision_aware=True, betas=betas, **{key: "bfloat16"})
                continue
            with pytest.raises(ValueError, match=f"set optimizer.{key}=float32"):
                OptimizerConfig(precision_aware=True, betas=betas, **{key: "bfloat16"})


# Master weights


def test_a_master_weight_is_its_bfloat16_and_the_16_bits_that_lacks():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    edges = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x3F80FFFF, 0x7F7FFFFF, -(2**31), -1 << 15])
    masters = torch.cat([bits, edges.int()]).view(torch.float32)
    masters = masters[masters.isfinite()]
    weights, remainders = split(masters)
    assert (weights.dtype, remainders.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(joined(weights, remainders).view(torch.int32), masters.view(torch.int32))
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000  # PyTorch rounds these to even, Transformer Engine up
    assert torch.equal(weights[~tie], masters.bfloat16()[~tie])
    assert torch.equal(joined(weights, torch.zeros_like(remainders)), weights.float())  # before the first update


# Over data-parallel ranks


def train(folder, dtype="float32", main_grads_dtype="float32", **parallel):
    """Weights, norms, which reductions had begun when the backward pass was over, and bytes and number of gradients."""
    parallel = ParallelConfig(device="cpu", **parallel)
    layout = initialize_parallel(parallel, CPU)
    model = ModelConfig(path=str(folder), dtype=dtype)
    optimizer = OptimizerConfig(learning_rate=1e-2, max_grad_norm=1e9, main_grads_dtype=main_grads_dtype)
    learner = Learner(folder, model, parallel, optimizer, AlgorithmConfig(), CPU)
    [microbatches] = make_batch(folder, learner, layout)
    microbatches = list(microbatches) * (2 - layout.data_rank)  # ranks may have different numbers of rows
    begun, finish = [], _ParamAndGradBucketGroup.finish_grad_sync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _ParamAndGradBucketGroup,
            "finish_grad_sync",
            lambda group, **options: (begun.append(group.grad_reduce_handle is not None), finish(group, **options)),
        )
        norms = [learner.update(microbatches).gradient_norm for _ in range(UPDATES)]
    weights = torch.cat([parameter.detach().flatten() for parameter in learner.policy.parameters()])
    trained = [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
    held = sum(parameter.main_grad.nbytes for parameter in trained), sum(map(torch.numel, trained))
    destroy_parallel()
    return weights.float().numpy(), norms, begun, held


def over_two_ranks(folder):
    return {
        "plain": train(folder),
        "overlapped": train(folder, overlap_grad_reduce=True, bucket_size=5000),
        "one bucket": train(folder, overlap_grad_reduce=True),
        "whole optimizer": train(folder, overlap_grad_reduce=True, bucket_size=5000, distributed_optimizer=False),
        "float32 gradients": train(folder, "bfloat16"),
        "bfloat16 gradients": train(folder, "bfloat16", "bfloat16", overlap_grad_reduce=True, bucket_size=5000),
    }


@pytest.fixture(scope="module")
def ranks(tiny_checkpoint):
    return launch(2, over_two_ranks, tiny_checkpoint("qwen2_5_vl", tie_word_embeddings=True))


def test_overlapped_reductions_train_bit_for_bit_as_others(ranks):
    for rank in ranks:
        weights, norms, begun, _ = rank["plain"]
        assert not any(begun)
        for case, buckets in (("overlapped", 5), ("one bucket", 1), ("whole optimizer", 5)):
            others, other_norms, begun, _ = rank[case]
            assert (weights == others).all(), case
            assert other_norms == pytest.approx(norms, rel=1e-6)  # its sum goes over other shards
            groups = len(begun) // UPDATES
            assert groups >= buckets
            # In the first step Megatron learns which gradients a bucket waits for.
            assert begun == [False] * groups + [True] * groups * (UPDATES - 1), case


def test_gradients_in_bfloat16_take_half_and_are_near_those_in_float32(ranks):
    for rank in ranks:
        weights, norms, _, (held, count) = rank["float32 gradients"]
        rounded, rounded_norms, _, (rounded_held, _) = rank["bfloat16 gradients"]
        assert (held, rounded_held) == (4 * count, 2 * count)
        assert rounded_norms[0] != norms[0] and rounded_norms[0] == pytest.approx(norms[0], rel=0.01)
        assert 0 < abs(rounded - weights).max() <= 2 * UPDATES * 0.01  # AdamW goes no further than the learning rate


# What the planner says of them


def test_the_planner_counts_their_bytes():
    narrow = {"precision_aware": True, "exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
    kept = [OptimizerBytes.of(OptimizerConfig(**keys)).kept for keys in ({}, {"precision_aware": True}, narrow)]
    assert kept == [12, 10, 6]
    overrides = [f"{key}={value}" for key, value in NARROW.items()]
    found = {}
    for name, keys in {"plain": [], "narrow": [*overrides, "optimizer.main_grads_dtype=bfloat16"]}.items():
        planner = Planner.of(recipe("qwen2_5_vl_72b", *keys), Cluster(8))
        memory = planner.plan(Layout.of(planner.config)).memory
        updates = [moment.parts for moment in memory.moments if moment.name == "update"]
        names = ("optimizer", "gradients", "scratch")
        found[name] = {part: max(parts.get(part, 0) for parts in updates) for part in names}
        found[name]["host"] = memory.host["optimizer"]
    plain, narrow = found["plain"], found["narrow"]
    assert narrow["optimizer"] == plain["optimizer"] / 2 and narrow["gradients"] == plain["gradients"] / 2
    assert narrow["host"] == pytest.approx(plain["host"] / 2, rel=0.02)
    assert plain["scratch"] == 0 and narrow["scratch"] == pytest.approx(8 / 12 * plain["optimizer"])


@pytest.mark.parametrize("name, nodes", [("qwen2_5_vl_32b", 4), ("qwen2_5_vl_72b", 8)])
def test_the_planner_counts_their_time(name, nodes):
    def seconds(*overrides):
        planner = Planner.of(recipe(name, *overrides), Cluster(nodes))
        return planner.plan(Layout.of(planner.config)).update_seconds

    off = ["parallel.overlap_grad_reduce=false", "model.apply_rope_fusion=false"]
    off += ["model.gradient_accumulation_fusion=false"]
    plain = seconds(*off)
    for change, part in (
        (["parallel.overlap_grad_reduce=true"], "optimizer"),
        (["model.apply_rope_fusion=true"], "train"),
        (["model.gradient_accumulation_fusion=true"], "train"),
        (["optimizer.main_grads_dtype=bfloat16"], "optimizer"),
    ):
        assert seconds(*off, *change)[part] < plain[part], change
    assert seconds(*off, *(f"{key}={value}" for key, value in NARROW.items()))["optimizer"] > plain["optimizer"]


# On a GPU, with Transformer Engine


@pytest.fixture(scope="module")
def cuda():
    parallel, platform = ParallelConfig(device="cuda"), Platform.resolve("cuda")
    layout = initialize_parallel(parallel, platform)
    yield parallel, platform, layout
    destroy_parallel()
    torch.distributed.destroy_process_group()


def make_learner(folder, cuda, optimizer, **model) -> Learner:
    parallel, platform, _ = cuda
    return Learner(folder, ModelConfig(path=str(folder), **model), parallel, optimizer, AlgorithmConfig(), platform)


def masters(learner: Learner) -> torch.Tensor:
    """Float32 master weights, flat, as a checkpoint has them."""
    [part] = learner.optimizer.chained_optimizers
    trained = [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
    return torch.cat([part._get_main_param_and_optimizer_states(p)["param"].detach().flatten() for p in trained])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("key", ["apply_rope_fusion", "gradient_accumulation_fusion"])
def test_fused_kernels_compute_what_others_do(tiny_checkpoint, cuda, key):
    folder = tiny_checkpoint("qwen2_5_vl", text_config=WIDE)
    unclipped = OptimizerConfig(learning_rate=0, max_grad_norm=1e9)  # clipping scales `main_grad` in place
    found = []
    for fused in (False, True):
        learner = make_learner(folder, cuda, unclipped, **{key: fused})
        [microbatches] = make_batch(folder, learner, cuda[2])
        learner.update(list(microbatches) * 2)  # so that gradients add up over microbatches
        layers = learner.policy.language_model.decoder.layers
        gradients = torch.cat([p.main_grad.flatten() for p in layers.parameters() if p.requires_grad])
        found.append((torch.cat(learner.logprobs(microbatches)), gradients.double()))
    (logprobs, gradients), (fused_logprobs, fused_gradients) = found
    assert not torch.equal(gradients, fused_gradients), "nothing was fused"
    assert (logprobs - fused_logprobs).abs().mean() < 0.02
    assert torch.nn.functional.cosine_similarity(gradients, fused_gradients, dim=0) > 0.999
    assert 0.99 < fused_gradients.norm() / gradients.norm() < 1.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_precision_aware_optimizer_has_the_same_master_weights_and_resumes(tiny_checkpoint, cuda, tmp_path):
    """In float32 moments to rounding, in bfloat16 near; its state leaves the device, and goes through a checkpoint."""
    folder, found = tiny_checkpoint("qwen2_5_vl", text_config=WIDE), {}
    narrow = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "main_grads_dtype": "bfloat16"}
    aware = {"precision_aware": True}
    for name, keys in {"plain": {}, "aware": aware, "narrow": aware | narrow}.items():
        learner = make_learner(folder, cuda, OptimizerConfig(learning_rate=1e-3, **keys))
        [microbatches] = make_batch(folder, learner, cuda[2])
        for _ in range(UPDATES):
            learner.onload()
            learner.update(microbatches)
            learner.offload()
        trained = sum(p.numel() for p in learner.policy.parameters() if p.requires_grad)
        found[name] = learner.optimizer_offload.host_bytes / trained
        learner.onload()
        found[name] = found[name], masters(learner)
    assert [found[name][0] for name in found] == pytest.approx([12, 10, 6], rel=0.01)
    torch.testing.assert_close(found["aware"][1], found["plain"][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["narrow"][1], found["plain"][1], rtol=0, atol=UPDATES * 1e-3)
    writer = CheckpointWriter(tmp_path, learner.platform, keep=1, timeout_seconds=60)
    writer.start(1, learner.model, learner.optimizer, {})
    writer.finish()
    resumed = make_learner(folder, cuda, OptimizerConfig(learning_rate=1e-3, precision_aware=True, **narrow))
    load_checkpoint(latest_checkpoint(tmp_path), resumed.model, resumed.optimizer)
    assert torch.equal(masters(resumed), found["narrow"][1])
    for one in (learner, resumed):
        one.update(microbatches)
    torch.testing.assert_close(masters(resumed), masters(learner), rtol=1e-5, atol=1e-5)
