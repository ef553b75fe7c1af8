"""Advantages: their exact invariants, and parity with what TRL's GRPOTrainer computes on the same rewards."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.config.schema import AlgorithmConfig
from tests.support.algorithm_cases import NAMES, random_rewards
from tests.support.trl_trainer import tiny_trl_trainer

PLAIN = AlgorithmConfig(length_control="none", whiten=False)


def permuted(rewards: RewardBatch, order: torch.Tensor) -> RewardBatch:
    return RewardBatch(
        rewards.names, rewards.values[:, order], rewards.valid[:, order],
        rewards.lengths[order], rewards.reference_lengths[order], rewards.group_ids[order],
    )  # fmt: skip


configs = st.sampled_from(
    [
        AlgorithmConfig(normalization=normalization, length_control=control, whiten=whiten)
        for normalization in ("gdpo", "grpo")
        for control in ("gate", "linear", "none")
        for whiten in (True, False)
    ]
)
group_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(configs, group_sizes, st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
def test_permuting_rollouts_permutes_advantages(config, sizes, seed, missing):
    rewards = random_rewards(seed, sizes, missing)
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    straight, shuffled = compute_advantages(rewards, config), compute_advantages(permuted(rewards, order), config)
    torch.testing.assert_close(straight.values[order], shuffled.values)
    assert torch.equal(straight.gated[order], shuffled.gated)


@settings(deadline=None, max_examples=40)
@given(configs, group_sizes, st.integers(0, 1000))
def test_missing_values_are_never_read(config, sizes, seed):
    rewards = random_rewards(seed, sizes, missing=0.4)
    poisoned = replace(rewards, values=torch.where(rewards.valid, rewards.values, torch.nan))
    expected, found = compute_advantages(rewards, config), compute_advantages(poisoned, config)
    assert torch.equal(expected.values, found.values)
    assert found.values.isfinite().all()


def test_matches_the_formula_written_out():
    rewards = random_rewards(0, [4, 6], missing=0.2)
    config = PLAIN.model_copy(update={"weights": {"precision": 2.0, "recall": 0.5, "linguistic": 1.0}})
    found = compute_advantages(rewards, config)
    for i in range(10):
        members = [j for j in range(10) if rewards.group_ids[j] == rewards.group_ids[i]]
        total = 0.0
        for k, weight in enumerate((2.0, 0.5, 1.0)):
            group = torch.tensor([rewards.values[k, j] for j in members if rewards.valid[k, j]])
            if rewards.valid[k, i] and len(group) > 1:
                total += weight * float((rewards.values[k, i] - group.mean()) / (group.std() + 1e-4))
        assert found.values[i] == pytest.approx(total, abs=1e-5)


def test_group_constant_component_gives_exactly_zero():
    rewards = random_rewards(1, [3, 8])
    values = rewards.values.clone()
    values[1, :3], values[1, 3:] = 0.1, 0.7  # neither is exact in binary
    found = compute_advantages(replace(rewards, values=values), PLAIN)
    assert torch.equal(found.per_component[1], torch.zeros(11))
    assert found.per_component[0].abs().min() > 0
    constant = values[1].expand(3, -1).clone()
    for config in (PLAIN, AlgorithmConfig(length_control="none"), PLAIN.model_copy(update={"normalization": "grpo"})):
        assert torch.equal(compute_advantages(replace(rewards, values=constant), config).values, torch.zeros(11))


def test_scale_of_a_component_does_not_matter():
    rewards = random_rewards(2, [8] * 4)
    values = rewards.values.clone()
    values[0] = 0.3 * values[0] + 0.5
    found = [compute_advantages(replace(rewards, values=v), PLAIN).per_component for v in (rewards.values, values)]
    torch.testing.assert_close(found[0], found[1], rtol=5e-3, atol=0)  # what ε leaves of a smaller range
    grpo = PLAIN.model_copy(update={"normalization": "grpo"})
    summed = [compute_advantages(replace(rewards, values=v), grpo).values for v in (rewards.values, values)]
    assert (summed[0] - summed[1]).abs().max() > 0.1  # the baseline is not scale-free; that is why GDPO exists


def test_group_of_one_and_single_valid_member_get_zero():
    rewards = random_rewards(3, [1, 4])
    valid = rewards.valid.clone()
    valid[2, 1:] = torch.tensor([True, False, False, False])
    found = compute_advantages(replace(rewards, valid=valid), PLAIN)
    assert found.values[0] == 0
    assert torch.equal(found.per_component[2], torch.zeros(5))


def test_missing_rewards_leave_the_others_alone():
    rewards = random_rewards(4, [6])
    valid = rewards.valid.clone()
    valid[0, 2] = False
    found = compute_advantages(replace(rewards, valid=valid), PLAIN).per_component[0]
    others = [0, 1, 3, 4, 5]
    expected = compute_advantages(permuted(rewards, torch.tensor(others)), PLAIN).per_component[0]
    assert found[2] == 0
    torch.testing.assert_close(found[others], expected)


def test_grpo_drops_a_rollout_whose_sum_is_unknown():
    rewards = random_rewards(5, [5])
    valid = rewards.valid.clone()
    valid[1, 3] = False
    grpo = PLAIN.model_copy(update={"normalization": "grpo"})
    found = compute_advantages(replace(rewards, valid=valid), grpo).values
    total = rewards.values.sum(dim=0)[[0, 1, 2, 4]]
    assert found[3] == 0
    torch.testing.assert_close(found[[0, 1, 2, 4]], (total - total.mean()) / (total.std() + 1e-4))


def test_zero_spread_of_the_sum_keeps_what_components_say():
    rewards = random_rewards(6, [4])
    values = torch.tensor([[0.1, 0.4, 0.6, 0.9], [0.9, 0.6, 0.4, 0.1], [0.5] * 4])
    config = PLAIN.model_copy(update={"weights": {"precision": 2.0, "recall": 1.0, "linguistic": 1.0}})
    assert compute_advantages(replace(rewards, values=values), config).values.abs().min() > 0


def test_weights_go_by_name():
    rewards = random_rewards(7, [6, 6])
    order = torch.tensor([2, 0, 1])
    reordered = replace(rewards, names=tuple(NAMES[k] for k in order), values=rewards.values[order])
    config = PLAIN.model_copy(update={"weights": {"precision": 1.0, "recall": 2.0, "linguistic": 3.0}})
    torch.testing.assert_close(compute_advantages(rewards, config).values, compute_advantages(reordered, config).values)


def test_gate_bounds_are_inclusive_and_zero_is_real():
    lengths = torch.tensor([4.0, 5.0, 10.0, 20.0, 21.0])
    rewards = replace(random_rewards(8, [5]), lengths=lengths, reference_lengths=torch.full((5,), 10.0))
    found = compute_advantages(rewards, PLAIN.model_copy(update={"length_control": "gate"}))
    assert found.gated.tolist() == [True, False, False, False, True]
    zeroed = rewards.values.clone()
    zeroed[2, [0, 4]] = 0.0
    expected = compute_advantages(replace(rewards, values=zeroed), PLAIN)
    torch.testing.assert_close(found.values, expected.values)
    for lower, upper, length in ((0.3, 2.0, 3.0), (0.1, 0.7, 7.0)):  # bounds that binary floats only approximate
        gate = {"lower": lower, "upper": upper}
        config = AlgorithmConfig(gate=gate)
        one = replace(rewards, lengths=torch.full((5,), length))
        assert not compute_advantages(one, config).gated.any()


def test_gate_turns_a_missing_linguistic_reward_into_zero():
    rewards = random_rewards(9, [4])
    valid, lengths = rewards.valid.clone(), rewards.reference_lengths.clone()
    valid[2, 0], lengths[0] = False, 1.0
    gated = replace(rewards, valid=valid, lengths=lengths)
    found = compute_advantages(gated, PLAIN.model_copy(update={"length_control": "gate"}))
    assert found.per_component[2, 0] < 0


def test_linear_penalty_takes_the_distance_from_the_linguistic_reward():
    rewards = random_rewards(10, [6])
    config = PLAIN.model_copy(update={"length_control": "linear", "linear_penalty": 0.25})
    values = rewards.values.clone()
    values[2] -= 0.25 * (rewards.lengths / rewards.reference_lengths - 1).abs()
    expected = compute_advantages(replace(rewards, values=values), PLAIN)
    torch.testing.assert_close(compute_advantages(rewards, config).values, expected.values)


def test_whitening_is_per_sequence_over_the_batch():
    rewards = random_rewards(11, [8] * 5)
    raw = compute_advantages(rewards, PLAIN).values
    white = compute_advantages(rewards, AlgorithmConfig(length_control="none")).values
    torch.testing.assert_close(white, (raw - raw.mean()) / (raw.std() + 1e-4))


@pytest.mark.parametrize(
    ("aggregation", "missing"),
    # Not grpo with missing rewards: TRL counts one as 0 in the sum there, we leave the rollout out.
    [("normalize_then_sum", False), ("normalize_then_sum", True), ("sum_then_normalize", False)],
)
def test_parity_with_trl(tmp_path, aggregation, missing):
    """TRL's own GRPOTrainer, on a tiny random model, scores its completions with rewards that we dictate."""
    groups, size = 3, 4
    rewards = random_rewards(12, [size] * groups, missing=0.25 if missing else 0.0)
    valid = rewards.valid.clone()
    if missing:
        valid[:, 5] = False  # a completion that no judge could score
    rewards = replace(rewards, valid=valid)

    def component(k: int):
        def reward(completions, **_):
            return [float(v) if ok else None for v, ok in zip(rewards.values[k], rewards.valid[k])]

        reward.__name__ = NAMES[k]
        return reward

    weights = {"precision": 1.0, "recall": 0.5, "linguistic": 2.0}
    trainer = tiny_trl_trainer(
        tmp_path, [component(k) for k in range(3)], prompts=groups, max_completion_length=2, num_generations=size,
        per_device_train_batch_size=groups * size, reward_weights=list(weights.values()),
        multi_objective_aggregation=aggregation,
    )  # fmt: skip
    expected = trainer._generate_and_score_completions([{"prompt": "a b"}] * (groups * size))["advantages"]

    normalization = "gdpo" if aggregation == "normalize_then_sum" else "grpo"
    config = AlgorithmConfig(normalization=normalization, length_control="none", weights=weights)
    torch.testing.assert_close(compute_advantages(rewards, config).values, expected, rtol=1e-4, atol=1e-5)
