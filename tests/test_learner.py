"""The learner: what must hold exactly at a step's first update, and that a broken step moves nothing."""

import pytest
import torch
from PIL import Image

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.algorithm.metrics import PolicyMetrics
from balcap_mega.algorithm.policy_loss import PolicyLoss
from balcap_mega.config.schema import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.families import FAMILIES
from balcap_mega.models.processing import PromptProcessor
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rollout.rollouts import Rollout, RolloutGroup, SeenRecord
from balcap_mega.training.batches import batch_builder
from balcap_mega.training.learner import Learner, must_be_finite
from balcap_mega.training.microbatch import with_old_logprobs, with_reference_logprobs
from balcap_mega.training.prompts import Prompts
from balcap_mega.training.update import caption_logprobs, update_policy

PARALLEL = ParallelConfig(device="cpu")
CAPTIONS = ("A large red circle.", "Two blue squares are above a star.", "A star.", "A red star is to the left.")


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    yield initialize_parallel(PARALLEL, Platform.resolve("cpu"))
    destroy_parallel()
    torch.distributed.destroy_process_group()


def make_learner(folder, dtype="float32", parallel=PARALLEL, eps=1e-8, **algorithm) -> Learner:
    model = ModelConfig(path=str(folder), dtype=dtype)
    config = AlgorithmConfig(**algorithm)
    return Learner(
        folder, model, parallel, OptimizerConfig(learning_rate=1e-2, eps=eps), config, Platform.resolve("cpu")
    )


def make_batch(folder, learner, layout, updates=1, fp8="none", advantages=None):
    """Two prompts with two captions each, with made-up engine logprobs and advantages."""
    processor = PromptProcessor(folder)
    records = [CaptionRecord(str(n), Image.new("RGB", (56, 84), (9, 99, 40 * n)), "Describe it.", "") for n in range(2)]
    groups = []
    for number, record in enumerate(records):
        tokens = [processor.encode_caption(text) for text in CAPTIONS[2 * number : 2 * number + 2]]
        rollouts = tuple(Rollout(ids, (-6.0,) * len(ids), "", True) for ids in tokens)
        groups.append(RolloutGroup(number, processor(record).prompt_token_ids, rollouts, SeenRecord.of(number, record)))
    if advantages is None:
        values = torch.tensor([1.0, -1.0, 0.5, -0.5])
        advantages = Advantages(values, values[None], torch.zeros(4, dtype=torch.bool))
    config = RunConfig(output_dir="unused", model={"path": str(folder), "fp8": fp8}, packing={"row_tokens": 256})
    builder = batch_builder(processor, config, layout, learner.architecture)
    return builder.from_rollouts(Prompts(records, range(2)), groups, advantages, updates).minibatches


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_reads_nothing_back_to_embed_a_row(tiny_checkpoint, layout, family):
    """On a device whose memory nobody can read: there to wait for what is queued would end in an error.

    And a step's batches take the embeddings of a frozen tower's images with them.
    """
    folder = tiny_checkpoint(family)
    learner = make_learner(folder)
    [[microbatch, *_]] = make_batch(folder, learner, layout)
    policy = learner.policy
    assert policy.language_model.decoder.layers[0].self_attention.core_attention.backend == "flash"
    with torch.no_grad():
        expected, _ = policy._embed(microbatch.row.tokens[None], microbatch.images)
        assert len(policy._frozen_embeddings) == len(set(microbatch.images)) > 0
        policy._frozen_embeddings.clear()
        unreadable, _ = policy.to("meta")._embed(microbatch.row.tokens[None], microbatch.images)
    assert unreadable.is_meta and unreadable.shape == expected.shape and expected.isfinite().all()
    del microbatch, _
    assert not policy._frozen_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_first_update_has_ratio_one_and_no_divergence(tiny_checkpoint, layout, family):
    folder = tiny_checkpoint(family)
    learner = make_learner(folder, kl_weight=0.1)
    [microbatches] = make_batch(folder, learner, layout)
    [reference] = learner.reference_logprobs([microbatches])
    microbatches = with_reference_logprobs(microbatches, reference)
    first = learner.update(microbatches).metrics
    assert first["ratio_max"] == 1.0 and first["clip_fraction"] == 0.0
    assert first["kl_old"] == 0.0 and first["kl_reference"] == 0.0

    moved = {name: parameter.clone() for name, parameter in learner.policy.named_parameters()}
    [again] = learner.reference_logprobs([microbatches])
    assert all(map(torch.equal, again, reference)), "of the weights that it started from, whatever came since"
    assert all(torch.equal(parameter, moved[name]) for name, parameter in learner.policy.named_parameters())
    microbatches = with_old_logprobs(microbatches, again)
    second = learner.update(microbatches).metrics
    assert second["ratio_max"] > 1.0 and second["kl_old"] > 0.0 and second["kl_reference"] > 0.0


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"ratio_level": "sequence"}])
def test_captions_have_the_logprobs_that_the_step_began_with(tiny_checkpoint, layout, options):
    """Also those of a second update, which the first has moved away from: a mean over each caption's own tokens."""
    folder = tiny_checkpoint("qwen2_5_vl")
    learner = make_learner(folder, **options)
    minibatches = make_batch(folder, learner, layout, updates=2)
    expected = {}
    for microbatch in (each for minibatch in minibatches for each in minibatch):
        [logprobs] = learner.logprobs([microbatch])
        for sequence in microbatch.row.sequence_ids.unique().tolist():
            expected[sequence] = logprobs[microbatch.row.sequence_ids == sequence].double().mean().item()
    updates = update_policy(learner, minibatches, must_be_finite)
    assert updates[1].metrics["ratio_max"] != 1.0
    found = caption_logprobs(minibatches, updates, 4, torch.device("cpu"))
    assert found.tolist() == pytest.approx([expected[n] for n in range(4)], rel=1e-6)


def test_fused_and_plain_heads_train_alike(tiny_checkpoint, layout):
    """Five updates at the whole model's scale; `algorithm.fused` must not change what is learned."""
    folder = tiny_checkpoint("qwen2_5_vl")
    weights = []
    for fused in (True, False):
        learner = make_learner(folder, fused=fused, aggregation="sequence_mean")
        [microbatches] = make_batch(folder, learner, layout)
        for _ in range(5):
            learner.update(microbatches)
        weights.append(dict(learner.policy.named_parameters()))
    for name, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_fused_head_gives_autograds_gradient(tiny_checkpoint, layout, tied):
    """One supervised step through the fused head and through plain autograd over whole logits: the same gradient.

    A tied embedding gets gradient from both its ends, of which the head's goes past autograd into `main_grad`.
    """
    folder = tiny_checkpoint("qwen2_5_vl", tie_word_embeddings=tied)

    def plain(hidden, weight, microbatch):
        targets = microbatch.tokens.targets
        loss = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, reduction="sum")
        return PolicyLoss(loss, torch.tensor(len(targets)), PolicyMetrics.zero())

    gradients = []
    for fused in (True, False):
        learner = make_learner(folder)
        [microbatches] = make_batch(folder, learner, layout)
        learner.supervised_update(microbatches, 0.0) if fused else learner._step(microbatches, plain)
        trained = [(name, p) for name, p in learner.policy.named_parameters() if p.requires_grad]
        gradients.append({name: parameter.main_grad.clone() for name, parameter in trained})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_positive_advantage_raises_probability(tiny_checkpoint, layout):
    folder = tiny_checkpoint("qwen2_5_vl")
    learner = make_learner(folder)
    [microbatches] = make_batch(folder, learner, layout)
    before = learner.logprobs(microbatches)
    for _ in range(3):
        learner.update(microbatches)
    for microbatch, old, new in zip(microbatches, before, learner.logprobs(microbatches), strict=True):
        signs = microbatch.tokens.advantages[microbatch.tokens.sequence_ids].sign()
        assert ((new - old) * signs).sum() > 0


def test_a_step_that_is_not_finite_moves_nothing(tiny_checkpoint, layout):
    folder = tiny_checkpoint("qwen2_5_vl")
    learner = make_learner(folder)
    [microbatches] = make_batch(folder, learner, layout)
    before = {name: parameter.clone() for name, parameter in learner.policy.named_parameters()}
    microbatches[0].tokens.advantages[0] = float("nan")
    with pytest.raises(FloatingPointError, match="weights were left"):
        learner.update(microbatches)
    for name, parameter in learner.policy.named_parameters():
        assert torch.equal(parameter, before[name])


def test_minibatches_keep_groups_whole(tiny_checkpoint, layout):
    folder = tiny_checkpoint("qwen2_5_vl")
    learner = make_learner(folder)
    first, second = make_batch(folder, learner, layout, updates=2)
    sequences = [{n for m in half for n in m.tokens.sequence_ids.tolist()} for half in (first, second)]
    assert sequences == [{0, 1}, {2, 3}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_offloading_between_updates_changes_no_bit(tiny_checkpoint, layout, monkeypatch, dtype, distributed_optimizer):
    """All memory but the weights' is really given back, and training goes on as if it had never left."""
    monkeypatch.setattr("balcap_mega.parallel.host_memory.BLOCK_BYTES", 100_000)  # so that tensors lie across blocks
    folder = tiny_checkpoint("qwen2_5_vl")
    trained = []
    for offload in ("never", "always"):
        parallel = PARALLEL.model_copy(update={"offload": offload, "distributed_optimizer": distributed_optimizer})
        learner = make_learner(folder, dtype, parallel)
        [microbatches] = make_batch(folder, learner, layout)
        for _ in range(3):
            learner.onload()
            learner.update(microbatches)
            learner.offload()
            learner.offload()
            learner.logprobs(microbatches)
        assert (held_bytes(training_state(learner)) == 0) == (offload == "always")
        trained.append([parameter.clone() for parameter in learner.policy.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True))
    with pytest.raises(RuntimeError, match="call onload"):
        learner.update(microbatches)


def training_state(learner) -> list[torch.Tensor]:
    """Gradients, float32 master weights and moments: what updates need beyond the weights themselves."""
    weights = {parameter.untyped_storage()._cdata for parameter in learner.policy.parameters()}
    trained = [parameter for parameter in learner.policy.parameters() if parameter.requires_grad]
    gradients = [parameter.main_grad for parameter in trained]
    optimizers = [part.optimizer for part in learner.optimizer.chained_optimizers]
    masters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    moments = [state[name] for o in optimizers for state in o.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * len(masters) >= len(trained)
    return [tensor for tensor in (*gradients, *masters, *moments) if tensor.untyped_storage()._cdata not in weights]


def held_bytes(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
