"""The clipped objective and the LM head that computes it without keeping logits, against plain autograd in float64."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from balcap_mega.algorithm import lm_head, logits
from balcap_mega.algorithm.batch import TokenBatch
from balcap_mega.algorithm.lm_head import HeadShard, fused_cross_entropy, fused_policy_loss, token_logprobs
from balcap_mega.algorithm.metrics import MAXIMA, SUMS, PolicyMetrics
from balcap_mega.algorithm.policy_loss import policy_loss
from balcap_mega.config.schema import AlgorithmConfig
from tests.support.algorithm_cases import AGGREGATIONS, EVERYTHING, random_tokens
from tests.support.distributed import launch
from tests.support.trl_trainer import tiny_trl_trainer


def select(tokens: TokenBatch, rows: torch.Tensor) -> TokenBatch:
    columns = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    return TokenBatch(**{k: v if k == "advantages" else v[rows] for k, v in columns.items()})


def current_logprobs(tokens: TokenBatch, seed: int = 99, spread: float = 0.3) -> torch.Tensor:
    noise = torch.randn(tokens.targets.shape, generator=torch.Generator().manual_seed(seed))
    return (tokens.old_logprobs + spread * noise).requires_grad_()


def written_out(logprob, old, rollout, reference, advantage, config: AlgorithmConfig) -> float:
    """One token's loss in plain Python, without the entropy bonus."""
    ratio = math.exp(logprob - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - config.clip_low), 1 + config.clip_high) * advantage)
    if config.dual_clip and advantage < 0:
        objective = max(objective, config.dual_clip * advantage)
    difference = reference - logprob
    weight = min(math.exp(old - rollout), config.importance_cap)
    return -weight * objective + config.kl_weight * (math.exp(difference) - difference - 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_matches_the_formula_written_out(aggregation):
    lengths = [3, 1, 7, 4]
    tokens = random_tokens(0, lengths, spread=1.0)
    config = EVERYTHING.model_copy(update={"aggregation": aggregation, "entropy_weight": 0.0})
    logprobs = current_logprobs(tokens, spread=1.5).detach()
    loss = policy_loss(logprobs, tokens, config, max_response_length=9)
    expected, t = 0.0, 0
    for length in lengths:
        for _ in range(length):
            row = (logprobs[t], tokens.old_logprobs[t], tokens.rollout_logprobs[t], tokens.reference_logprobs[t])
            term = written_out(*map(float, row), float(tokens.advantages[tokens.sequence_ids[t]]), config)
            expected += term / length if aggregation == "sequence_mean" else term
            t += 1
    assert float(loss.loss_sum) == pytest.approx(expected, rel=1e-5)
    assert int(loss.normaliser) == {"token_mean": 15, "sequence_mean": 4, "constant_length": 36}[aggregation]
    assert loss.normaliser.dtype == torch.int64


def test_first_update_has_ratio_one_and_no_kl():
    tokens = random_tokens(1, [5, 8])
    tokens = replace(tokens, reference_logprobs=tokens.old_logprobs, rollout_logprobs=tokens.old_logprobs)
    logprobs = tokens.old_logprobs.clone().requires_grad_()
    loss = policy_loss(logprobs, tokens, EVERYTHING.model_copy(update={"entropy_weight": 0.0}))
    loss.loss_sum.backward()
    summary = loss.metrics.summary()
    assert summary["ratio_max"] == summary["importance_weight"] == 1.0
    for name in ("kl_reference", "kl_old", "clip_fraction", "dual_clip_fraction", "engine_logprob_difference_max"):
        assert summary[name] == 0.0
    torch.testing.assert_close(logprobs.grad, -tokens.advantages[tokens.sequence_ids])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_does_not_depend_on_the_split(aggregation, level):
    tokens = random_tokens(2, [4, 2, 6, 1, 3])
    config = EVERYTHING.model_copy(update={"aggregation": aggregation, "ratio_level": level, "entropy_weight": 0.0})
    values = current_logprobs(tokens).detach()

    def gradient(parts: list[list[int]]) -> tuple[torch.Tensor, PolicyMetrics]:
        logprobs, normaliser, metrics = values.clone().requires_grad_(), 0, PolicyMetrics.zero()
        for part in parts:
            rows = torch.isin(tokens.sequence_ids, torch.tensor(part)).nonzero()[:, 0]
            loss = policy_loss(logprobs[rows], select(tokens, rows), config, max_response_length=8)
            loss.loss_sum.backward()
            normaliser, metrics = normaliser + loss.normaliser, metrics + loss.metrics
        return logprobs.grad / normaliser, metrics

    whole, whole_metrics = gradient([[0, 1, 2, 3, 4]])
    for parts in ([[0], [1], [2], [3], [4]], [[3, 0], [1, 4, 2]], [[2], [], [0, 1, 3, 4]]):
        split, metrics = gradient(parts)
        torch.testing.assert_close(split, whole)
        torch.testing.assert_close(metrics.sums, whole_metrics.sums)
        assert torch.equal(metrics.maxima, whole_metrics.maxima)


def test_permuting_sequences_changes_nothing():
    tokens = random_tokens(3, [4, 2, 6])
    logprobs = current_logprobs(tokens).detach()
    rows = torch.cat([(tokens.sequence_ids == i).nonzero()[:, 0] for i in (2, 0, 1)])
    config = EVERYTHING.model_copy(update={"entropy_weight": 0.0, "aggregation": "sequence_mean"})
    straight = policy_loss(logprobs, tokens, config)
    shuffled = policy_loss(logprobs[rows], select(tokens, rows), config)
    torch.testing.assert_close(straight.loss_sum, shuffled.loss_sum)
    assert straight.normaliser == shuffled.normaliser


def test_clip_and_dual_clip_remove_the_gradient_on_the_right_side():
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 2.0])
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    tokens = replace(random_tokens(4, [1] * 5), advantages=advantages, reference_logprobs=None)
    tokens = replace(tokens, rollout_logprobs=tokens.old_logprobs)
    logprobs = (tokens.old_logprobs + log_ratio).requires_grad_()
    loss = policy_loss(logprobs, tokens, AlgorithmConfig(dual_clip=3.0))
    loss.loss_sum.backward()
    assert [bool(g == 0) for g in logprobs.grad] == [True, False, False, True, True]
    assert loss.metrics.summary()["clip_fraction"] == pytest.approx(2 / 5)
    assert loss.metrics.summary()["dual_clip_fraction"] == pytest.approx(1 / 5)


def test_importance_weight_is_truncated_and_carries_no_gradient():
    tokens = replace(random_tokens(5, [2]), reference_logprobs=None, advantages=torch.ones(2))
    tokens = replace(tokens, rollout_logprobs=tokens.old_logprobs - torch.tensor([math.log(1.5), math.log(9.0)]))
    logprobs = tokens.old_logprobs.clone().requires_grad_()
    loss = policy_loss(logprobs, tokens, AlgorithmConfig(importance_cap=2.0))
    loss.loss_sum.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.5, -2.0]))
    assert loss.metrics.summary()["importance_truncated"] == 0.5
    off = policy_loss(logprobs, tokens, AlgorithmConfig(importance_cap=None))
    assert off.metrics.summary()["importance_weight"] == 1.0


def importance_of(config: AlgorithmConfig, sequences: list[list[float]]) -> tuple[list[float], float]:
    """The weight of each token (its gradient at ratio 1), and the share that was cut, of given exp(old − rollout)."""
    lengths, count = [len(weights) for weights in sequences], sum(map(len, sequences))
    tokens = replace(random_tokens(5, lengths), reference_logprobs=None, advantages=torch.ones(len(lengths)))
    logs = torch.tensor([math.log(weight) for weights in sequences for weight in weights])
    tokens = replace(tokens, rollout_logprobs=tokens.old_logprobs - logs)
    logprobs = tokens.old_logprobs.clone().requires_grad_()
    loss = policy_loss(logprobs, tokens, config)
    assert int(loss.normaliser) == count, "what is left out still counts in the divisor"
    loss.loss_sum.backward()
    summary = loss.metrics.summary()
    assert summary["importance_weight"] == pytest.approx(-float(logprobs.grad.mean()), rel=1e-5)
    return pytest.approx((-logprobs.grad).tolist(), rel=1e-4), summary["importance_truncated"]


def test_icepop_leaves_out_tokens_outside_the_band():
    """arXiv 2510.18855, equation of M(k): k within [α, β], else 0; Ring-1T has α = 0.5, β = 5."""
    found, cut = importance_of(AlgorithmConfig(importance="token_band"), [[0.49, 0.51, 4.9], [5.1, 1.0]])
    assert found == [0.0, 0.51, 4.9, 0.0, 1.0]
    assert cut == pytest.approx(2 / 5)


def test_sequences_outside_the_band_are_left_out_by_geometric_mean():
    sequences = [[3.0, 1 / 3], [1.2, 1.2, 1.2], [0.85], [1.05, 1.05]]
    config = AlgorithmConfig(importance="sequence_band", importance_cap=2.0)
    found, cut = importance_of(config, sequences)
    assert found == [2.0, 1 / 3, 0.0, 0.0, 0.0, 0.0, 1.05, 1.05]
    assert cut == pytest.approx(5 / 8)
    found, cut = importance_of(config.model_copy(update={"importance_cap": None}), sequences)
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert cut == pytest.approx(4 / 8)


def test_extreme_differences_stay_finite():
    tokens = random_tokens(6, [4])
    for sign in (-1, 1):
        logprobs = (tokens.old_logprobs + sign * 500).requires_grad_()
        far = replace(
            tokens, advantages=torch.tensor([0.0, 1.0, -1.0, 2.0]), rollout_logprobs=tokens.old_logprobs - 400
        )
        loss = policy_loss(logprobs, far, EVERYTHING.model_copy(update={"entropy_weight": 0.0}))
        loss.loss_sum.backward()
        assert loss.loss_sum.isfinite() and logprobs.grad.isfinite().all()


def test_sequence_level_is_gspo():
    """arXiv 2507.18071, equation 5: (1/G) Σ_i min(s_i A_i, clip(s_i) A_i) with s_i the length-normalised ratio."""
    lengths = [4, 2, 6]
    tokens = replace(random_tokens(7, lengths), reference_logprobs=None)
    config = AlgorithmConfig(ratio_level="sequence", aggregation="sequence_mean", importance_cap=None)
    logprobs = current_logprobs(tokens)
    loss = policy_loss(logprobs, tokens, config)
    (found,) = torch.autograd.grad(loss.loss_sum / loss.normaliser, logprobs)
    objective = 0
    for part in torch.arange(12).split(lengths):
        s = (logprobs[part] - tokens.old_logprobs[part]).mean().exp()
        a = tokens.advantages[tokens.sequence_ids[part[0]]]
        objective = objective + torch.minimum(s * a, s.clamp(0.8, 1.28) * a) / 3
    (expected,) = torch.autograd.grad(-objective, logprobs)
    torch.testing.assert_close(found, expected)


def test_metrics_have_a_name_each():
    loss = policy_loss(current_logprobs(random_tokens(8, [3])), random_tokens(8, [3]), AlgorithmConfig())
    assert loss.metrics.sums.shape == (len(SUMS),) and loss.metrics.maxima.shape == (len(MAXIMA),)
    assert not loss.metrics.sums.requires_grad


# The head. H is small; V is a multiple of nothing; the last columns of the weight are padding with huge values, which
# would show in every logprob if they took part.

VOCABULARY, PADDED, HIDDEN = 53, 64, 12


def head_weight(scale: float = 1.0) -> torch.Tensor:
    weight = scale * torch.randn(PADDED, HIDDEN, generator=torch.Generator().manual_seed(1))
    weight[VOCABULARY:] = 100.0
    return weight


def hidden_rows(count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2))


def reference_head(hidden, weight, targets, temperature):
    """Float64 logprobs and entropies straight from log_softmax."""
    log_p = F.log_softmax(hidden.double() @ weight.double()[:VOCABULARY].t() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 100])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_token_logprobs_and_their_gradients(rows_a_chunk, scale, monkeypatch):
    monkeypatch.setattr(logits, "CACHE_ELEMENTS", 2 * VOCABULARY)
    hidden, weight = hidden_rows(7).requires_grad_(), head_weight(scale).requires_grad_()
    targets = random_tokens(9, [7], VOCABULARY).targets
    head = HeadShard(weight, VOCABULARY, temperature=0.7, chunk_bytes=rows_a_chunk * PADDED * 4)
    found = token_logprobs(hidden, targets, head)
    expected = reference_head(hidden, weight, targets, 0.7)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4 * scale / 10)
    weights = torch.randn(2, 7, generator=torch.Generator().manual_seed(3))
    found = gradients((found[0] * weights[0]).sum() + (found[1] * weights[1]).sum(), hidden, weight)
    expected = gradients((expected[0] * weights[0]).sum() + (expected[1] * weights[1]).sum(), hidden, weight)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other.float(), rtol=1e-4 if scale == 1 else 1e-3, atol=1e-4 * scale)
    assert torch.equal(found[1][VOCABULARY:], torch.zeros(PADDED - VOCABULARY, HIDDEN))


@pytest.mark.parametrize("lengths", [[5, 1, 4], [1], []])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fused_loss_matches_autograd_through_logits(lengths, aggregation):
    tokens = random_tokens(10, lengths, VOCABULARY)
    config = EVERYTHING.model_copy(update={"aggregation": aggregation})
    hidden, weight = hidden_rows(sum(lengths)).requires_grad_(), head_weight().requires_grad_()
    head = HeadShard(weight, VOCABULARY, chunk_bytes=3 * PADDED * 4)
    found = fused_policy_loss(hidden, tokens, head, config, max_response_length=6)
    logprobs, entropy = reference_head(hidden, weight, tokens.targets, 1.0)
    expected = policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=6)
    torch.testing.assert_close(found.loss_sum.double(), expected.loss_sum, rtol=1e-5, atol=1e-5)
    assert found.normaliser == expected.normaliser
    torch.testing.assert_close(found.metrics.sums, expected.metrics.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.metrics.maxima, expected.metrics.maxima, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        gradients(2 * found.loss_sum, hidden, weight), gradients(2 * expected.loss_sum, hidden, weight)
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("importance", ["token_band", "sequence_band"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_left_out_by_the_fused_head_as_by_the_formula(importance, level):
    """In chunks shorter than a sequence: one that is judged by its sequence must still see all of it."""
    tokens = replace(random_tokens(12, [5, 1, 4], VOCABULARY), old_logprobs=None)
    hidden, weight = hidden_rows(10).requires_grad_(), head_weight().requires_grad_()
    bands = {"importance_token_band": (0.95, 1.1), "importance_sequence_band": (0.97, 1.02)}
    config = EVERYTHING.model_copy(update=bands | {"importance": importance, "ratio_level": level})
    head = HeadShard(weight, VOCABULARY, chunk_bytes=2 * PADDED * 4)
    logprobs, entropy = token_logprobs(hidden, tokens.targets, head)
    near = logprobs.detach() + 0.1 * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))
    tokens = replace(tokens, rollout_logprobs=near)
    expected = policy_loss(logprobs, tokens, config, entropy=entropy)
    expected_gradients = torch.autograd.grad(expected.loss_sum, (hidden, weight))
    assert 0 < expected.metrics.summary()["importance_truncated"] < 1
    found = fused_policy_loss(hidden, tokens, head, config)
    torch.testing.assert_close(found.metrics.sums, expected.metrics.sums, rtol=1e-4, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found.loss_sum, (hidden, weight)), expected_gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fused_and_forward_only_logprobs_are_the_same_numbers():
    """So that the first update's ratio is exactly 1."""
    tokens = random_tokens(11, [6, 5], VOCABULARY)
    hidden, weight = hidden_rows(11), head_weight().requires_grad_()
    head = HeadShard(weight, VOCABULARY, chunk_bytes=4 * PADDED * 4)
    with torch.no_grad():
        old, _ = token_logprobs(hidden, tokens.targets, head)
    tokens = replace(tokens, old_logprobs=old, reference_logprobs=old)
    metrics = fused_policy_loss(hidden, tokens, head, AlgorithmConfig()).metrics.summary()
    assert metrics["ratio_max"] == 1.0 and metrics["kl_old"] == 0.0 and metrics["kl_reference"] == 0.0


def test_cross_entropy_is_torchs():
    targets = random_tokens(12, [9], VOCABULARY).targets
    hidden, weight = hidden_rows(9).requires_grad_(), head_weight().requires_grad_()
    found = fused_cross_entropy(hidden, targets, HeadShard(weight, VOCABULARY, chunk_bytes=2 * PADDED * 4))
    expected = F.cross_entropy(hidden @ weight[:VOCABULARY].t(), targets, reduction="sum")
    torch.testing.assert_close(found.loss_sum, expected)
    assert int(found.normaliser) == 9
    for one, other in zip(gradients(found.loss_sum, hidden, weight), gradients(expected, hidden, weight)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_main_grad_receives_the_weight_gradient():
    tokens = random_tokens(13, [6, 3], VOCABULARY)
    hidden = hidden_rows(9)
    plain = head_weight().requires_grad_()
    (expected,) = gradients(fused_policy_loss(hidden, tokens, HeadShard(plain, VOCABULARY), EVERYTHING).loss_sum, plain)
    weight = torch.nn.Parameter(head_weight())
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(PADDED, HIDDEN), False
    loss = fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), EVERYTHING)
    loss.loss_sum.backward()
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, expected + 1)
    with torch.no_grad():  # an evaluation leaves gradients alone
        fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), EVERYTHING)
    torch.testing.assert_close(weight.main_grad, expected + 1)
    with pytest.raises(RuntimeError):  # already added, so it cannot be scaled
        (2 * fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), EVERYTHING).loss_sum).backward()


def test_main_grad_of_a_weight_tied_to_the_embedding():
    """Megatron's hook adds what autograd has for a tied weight to main_grad; the head's part is there already."""
    tokens = random_tokens(16, [6, 3], VOCABULARY)

    def loss_of(weight: torch.Tensor) -> torch.Tensor:
        hidden = F.embedding(tokens.targets.roll(1), weight)
        return fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), EVERYTHING).loss_sum

    plain = head_weight().requires_grad_()
    (expected,) = gradients(loss_of(plain), plain)
    weight = torch.nn.Parameter(head_weight())
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(PADDED, HIDDEN), False
    weight.zero_out_wgrad = True
    loss_of(weight).backward()
    torch.testing.assert_close(weight.main_grad + weight.grad, expected)


def test_sequence_level_falls_back_and_says_so(caplog):
    lm_head._say_fallback.cache_clear()  # it is said once
    tokens = random_tokens(14, [5, 4], VOCABULARY)
    config = EVERYTHING.model_copy(update={"ratio_level": "sequence"})
    hidden, weight = hidden_rows(9).requires_grad_(), head_weight().requires_grad_()
    found = fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), config)
    assert "recomputes" in caplog.text
    logprobs, entropy = reference_head(hidden, weight, tokens.targets, 1.0)
    expected = policy_loss(logprobs, tokens, config, entropy=entropy)
    for one, other in zip(gradients(found.loss_sum, hidden, weight), gradients(expected.loss_sum, hidden, weight)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "loss_type", "level"),
    [
        ("token_mean", "dapo", "token"),
        ("sequence_mean", "grpo", "token"),
        ("constant_length", "dr_grpo", "token"),
        ("sequence_mean", "grpo", "sequence"),
    ],
)
def test_parity_with_trl(tmp_path, aggregation, loss_type, level):
    """The loss that TRL's GRPOTrainer computes for the same tokens, and its gradient at the LM head and below it."""
    lengths, longest = [5, 2, 6, 3], 6
    trainer = tiny_trl_trainer(
        tmp_path, [lambda completions, **_: [0.0] * len(completions)], num_generations=4, per_device_train_batch_size=4,
        epsilon=0.2, epsilon_high=0.28, loss_type=loss_type, importance_sampling_level=level,
        max_completion_length=longest, use_bias_correction_kl=False,
    )  # fmt: skip
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.beta = 0.1  # after its construction, which would look for a reference model on the hub
    model = trainer.model.eval()

    tokens = random_tokens(17, lengths, 24, spread=0.5)
    tokens = replace(tokens, targets=tokens.targets.clamp(min=2))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def padded(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
        return torch.full(mask.shape, fill, dtype=values.dtype).masked_scatter(mask, values)

    prompt = torch.tensor([[2, 3]] * 4)
    sequences = torch.cat([prompt, padded(tokens.targets)], dim=1)
    head = HeadShard(model.lm_head.weight, 24)
    hidden = model.model(sequences).last_hidden_state[:, 1:-1][mask]
    noise = 0.3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(18))
    current = token_logprobs(hidden, tokens.targets, head)[0].detach()
    tokens = replace(
        tokens,
        old_logprobs=current + noise[0],
        rollout_logprobs=current + noise[1],
        reference_logprobs=current + noise[2],
    )
    config = AlgorithmConfig(aggregation=aggregation, ratio_level=level, kl_weight=0.1, importance_cap=1.2)
    found = fused_policy_loss(hidden, tokens, head, config, max_response_length=longest)
    (found.loss_sum / found.normaliser).backward()
    found_gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    expected = trainer._compute_loss(
        model,
        {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": padded(tokens.targets),
            "completion_mask": mask.long(),
            "advantages": tokens.advantages,
            "old_per_token_logps": padded(tokens.old_logprobs),
            "ref_per_token_logps": padded(tokens.reference_logprobs),
            "importance_sampling_ratio": padded((tokens.old_logprobs - tokens.rollout_logprobs).exp().clamp(max=1.2)),
            "num_items_in_batch": mask.sum(),
        },
    )
    expected.backward()
    torch.testing.assert_close(found.loss_sum / found.normaliser, expected, rtol=1e-5, atol=1e-6)
    for one, parameter in zip(found_gradients, model.parameters()):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def process_memory(field: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def test_logits_are_never_held_together():
    """2,048 rows of 20,000 logits are 156 MiB, and eager autograd holds three times that; here 4 MiB at a time."""
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    tokens = random_tokens(20, [512] * 4, 20_000)

    def run() -> None:
        fused_policy_loss(hidden, tokens, HeadShard(weight, 20_000, chunk_bytes=2**22), EVERYTHING).loss_sum.backward()

    run()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = process_memory("VmRSS")
    run()
    assert process_memory("VmHWM") - before < 45 * 2**20


def vocabulary_parallel_rank(padded: int):
    """On each rank: logprobs, the loss, the hidden gradient summed over ranks and this shard's weight gradient."""
    group = torch.distributed.group.WORLD
    tokens = random_tokens(15, [6, 4], VOCABULARY)
    full = torch.cat([head_weight()[:VOCABULARY], torch.full((padded - VOCABULARY, HIDDEN), 100.0)])
    weight = full.chunk(group.size())[group.rank()].clone().requires_grad_()
    hidden = hidden_rows(10).requires_grad_()
    head = HeadShard(weight, VOCABULARY, group, chunk_bytes=4 * weight.shape[0] * 4)
    with torch.no_grad():
        logprobs, _ = token_logprobs(hidden, tokens.targets, head)
    loss = fused_policy_loss(hidden, tokens, head, EVERYTHING)
    loss.loss_sum.backward()
    torch.distributed.all_reduce(hidden.grad)
    return logprobs.numpy(), loss.loss_sum.item(), hidden.grad.numpy(), weight.grad.numpy()


@pytest.mark.parametrize("padded", [64, 128])  # at 128 the second rank holds nothing but padding
def test_two_vocabulary_parallel_ranks_agree_with_one(padded):
    tokens = random_tokens(15, [6, 4], VOCABULARY)
    hidden, weight = hidden_rows(10).requires_grad_(), head_weight()[:VOCABULARY].requires_grad_()
    loss = fused_policy_loss(hidden, tokens, HeadShard(weight, VOCABULARY), EVERYTHING)
    loss.loss_sum.backward()
    logprobs, _ = reference_head(hidden, weight, tokens.targets, 1.0)
    shards = launch(2, vocabulary_parallel_rank, padded)
    for shard in shards:
        torch.testing.assert_close(torch.tensor(shard[0]), logprobs.float())
        assert shard[1] == pytest.approx(loss.loss_sum.item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(shard[2]), hidden.grad, rtol=1e-4, atol=1e-5)
    found = torch.cat([torch.tensor(shard[3]) for shard in shards])
    torch.testing.assert_close(found[:VOCABULARY], weight.grad, rtol=1e-4, atol=1e-5)
    assert not found[VOCABULARY:].any()
