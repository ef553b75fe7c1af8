"""What is wrong with a run is found, in the program and in its real parts, and stopped, skipped or told."""

import math
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.config.schema import (
    AlgorithmConfig,
    HealthConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from balcap_mega.parallel.groups import initialize_parallel
from balcap_mega.parallel.platform import Platform
from balcap_mega.rewards.collect import CaptionScore, build_reward_batch
from balcap_mega.rollout.engine import RolloutEngine
from balcap_mega.rollout.refit import build_refit, weight_transfer
from balcap_mega.rollout.refit.refit import CorruptRefit
from balcap_mega.training.batches import batch_builder
from balcap_mega.training.guard.health import Health, Unhealthy
from balcap_mega.training.learner import Learner, UpdateResult
from balcap_mega.training.observe.step_metrics import reward_metrics
from balcap_mega.training.prompts import Prompts
from tests.support.distributed import launch
from tests.support.rollout_cases import make_prompts
from tests.test_learner import make_batch
from tests.test_pretrain_rl import ROOT, command, rows

PARALLEL = ParallelConfig(device="cpu")
WEIGHTS = {"precision": 1.0, "recall": 1.0, "linguistic": 1.0}


def make_learner(folder) -> Learner:
    model = ModelConfig(path=str(folder), dtype="float32")
    optimizer = OptimizerConfig(learning_rate=1e-2)
    return Learner(folder, model, PARALLEL, optimizer, AlgorithmConfig(), Platform.resolve("cpu"))


def make_health(**checks) -> Health:
    return Health(HealthConfig.model_validate(checks), WEIGHTS)


# An update that is left out


def leave_one_out(folder) -> bool:
    """Two data-parallel ranks, of which one meets NaN. Does the next update end where it would without that one?"""
    layout = initialize_parallel(PARALLEL, Platform.resolve("cpu"))
    bad, health = layout.data_rank == 1, make_health(non_finite="skip")
    states = []
    for meets_nan in (True, False):
        learner = make_learner(folder)
        [microbatches] = make_batch(folder, learner, layout)
        learner.update(microbatches)
        if meets_nan:
            weights = {name: parameter.clone() for name, parameter in learner.policy.named_parameters()}
            [poisoned] = make_batch(folder, learner, layout)
            if bad:
                poisoned[0].tokens.advantages[:] = math.nan
            assert not learner.update(poisoned, lambda result: health.accepts(2, result)).applied
            assert all(torch.equal(value, weights[name]) for name, value in learner.policy.named_parameters())
        learner.update(microbatches)
        states.append([parameter.detach().clone() for parameter in learner.policy.parameters()])
    [finding] = health.observe(2, {"policy/updates_skipped": 1.0})
    assert (finding.check, finding.policy) == ("non_finite", "skip") and "loss nan" in finding.problem
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_update_left_out_leaves_no_trace_on_any_rank(tiny_checkpoint):
    assert launch(2, leave_one_out, tiny_checkpoint("qwen2_5_vl")) == [True, True]


# Faults planted in the policy and in the engine


class Parts:
    """The learner, a vLLM engine with the same weights, and one step's way between them."""

    def __init__(self, folder):
        platform = Platform.resolve("cpu")
        layout = initialize_parallel(PARALLEL, platform)
        self.learner = make_learner(folder)
        rollout = RolloutConfig(group_size=2, max_tokens=12, max_model_len=512, verify_refit_every=1)
        self.engine = RolloutEngine(folder, rollout, device=platform.device, dtype=torch.float32, seed=0)
        self.refit = build_refit(self.learner.policy, self.engine, PARALLEL)
        config = RunConfig(output_dir="unused", model={"path": str(folder)}, packing={"row_tokens": 1024})
        self.batches = batch_builder(self.engine.processor, config, layout, self.learner.architecture)
        self.prompts = make_prompts(2)
        self.learner.set_learning_rate(0.0)

    def update(self, health: Health, step: int = 1) -> UpdateResult:
        """An update of the captions that the engine draws now."""
        groups = self.engine.sample(self.prompts, step=0)

        def score(precision: float) -> CaptionScore:
            return CaptionScore({"precision": precision, "recall": 0.5, "linguistic": 0.5}, 1.0, 1.0)

        scores = [[score(0.1 * n) for n in range(len(group.rollouts))] for group in groups]
        advantages = compute_advantages(build_reward_batch(scores), AlgorithmConfig())
        records = Prompts([prompt.record for prompt in self.prompts], range(len(self.prompts)))
        [microbatches] = self.batches.from_rollouts(records, groups, advantages, 1).minibatches
        return self.learner.update(microbatches, lambda result: health.accepts(step, result))

    def change_engine(self, change: Callable[[Tensor], None]) -> None:
        """Apply `change` to the scale of the language model's last norm, as the engine has it."""
        self.engine.llm.apply_model(lambda model: change(model.get_language_model().model.norm.weight.data))


def flip_a_bit(values: Tensor) -> None:
    """The sign of the first of some float32 numbers."""
    values.view(torch.int32).flatten()[0] ^= -(2**31)


def plant_in_real_parts(folder) -> None:
    parts = Parts(folder)
    parts.refit.run()
    healthy, bounds = make_health(), {"policy": "skip", "bound": 1e-3}
    assert parts.update(healthy).applied and healthy.observe(1, {}) == []

    # One bit of the engine's weights after a refit; the next refit mends it.
    parts.change_engine(flip_a_bit)
    health = make_health(mismatch=bounds)
    assert not parts.update(health).applied
    [finding] = health.observe(1, {})
    assert (finding.check, finding.policy) == ("mismatch", "skip") and finding.value > finding.bound
    assert parts.update(make_health(mismatch={**bounds, "policy": "warn"})).applied
    with pytest.raises(Unhealthy, match=r"step 7, health\.mismatch: .* not have the same weights.*verify_refit_every"):
        parts.update(make_health(mismatch={**bounds, "policy": "stop"}), step=7)
    parts.refit.run()
    assert parts.update(make_health(mismatch=bounds)).applied

    # One bit while a refit writes, of the first bucket's pieces.
    copy = torch._foreach_copy_

    def copy_wrongly(targets, values):
        copy(targets, values)
        flip_a_bit(targets[0])

    weight_transfer.torch._foreach_copy_ = copy_wrongly
    with pytest.raises(CorruptRefit, match=r"rank 0 in phase transfer, bucket 1 of \d+: 1 of \d+ pieces are not what"):
        parts.refit.run()
    weight_transfer.torch._foreach_copy_ = copy
    parts.refit.run()

    # NaN in the engine: it draws something, with logprobs that are no numbers.
    parts.change_engine(lambda scale: scale.fill_(math.nan))
    with pytest.raises(Unhealthy, match=r"health\.non_finite: .*difference of logprobs nan"):
        parts.update(make_health())
    parts.refit.run()

    # An entropy near 0: the policy's last norm multiplied, the engine following it.
    scale = dict(parts.learner.policy.named_parameters())["language_model.decoder.final_layernorm.weight"]
    with torch.no_grad():
        scale.mul_(1e4)
    parts.refit.run()
    health = make_health(mismatch={"policy": "warn"}, low_entropy={"policy": "stop", "steps": 1})
    findings = health.observe(1, {"policy/entropy": parts.update(health).metrics["entropy"]})
    assert findings[-1].check == "low_entropy" and findings[-1].policy == "stop"

    # NaN in the policy.
    with torch.no_grad():
        scale[0] = math.nan
    with pytest.raises(Unhealthy, match=r"step 3, health\.non_finite: loss nan, gradient norm nan"):
        parts.update(make_health(), step=3)


def test_faults_planted_in_policy_and_engine_are_named(tiny_checkpoint):
    launch(1, plant_in_real_parts, tiny_checkpoint("qwen2_5_vl"))


# Trends


def judged(**scores) -> dict[str, float]:
    """A step's reward metrics: two groups of two captions, of 8 words for 10 of the reference unless told otherwise."""
    values = {"precision": (0.2, 0.4, 0.6, 0.8), "recall": (0.1, 0.2, 0.3, 0.4), "linguistic": (0.5, 0.6, 0.7, 0.8)}
    columns = values | {"length": (8.0,) * 4} | scores
    lengths = columns.pop("length")
    rows = [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]
    captions = [CaptionScore(row, length, reference_length=10.0) for row, length in zip(rows, lengths, strict=True)]
    rewards = build_reward_batch([captions[:2], captions[2:]])
    return reward_metrics(rewards, compute_advantages(rewards, AlgorithmConfig()))


@pytest.mark.parametrize(
    ("check", "wrong", "sound"),
    [
        ("constant_reward", judged(recall=(0.3,) * 4), True),
        ("missing_reward", judged(linguistic=(None, 0.5, 0.6, 0.7)), True),
        ("short_captions", judged(length=(0.0, 1.0, 1.0, 1.0)), False),
        ("long_captions", judged(length=(80.0,) * 4), False),
        ("low_entropy", judged() | {"policy/entropy": 1e-3}, False),
        ("skipped", judged() | {"policy/updates_skipped": 0.5}, False),
    ],
)
def test_a_trend_is_told_when_it_lasts(check, wrong, sound):
    well = judged() | {"policy/entropy": 1.0, "policy/updates_skipped": 0.0}
    health = make_health(**{check: {"steps": 3, "policy": "stop"}})
    told = [health.observe(step, metrics) for step, metrics in enumerate([wrong, wrong, well, *[wrong] * 6], start=1)]
    assert [step for step, findings in enumerate(told, start=1) if findings] == [6, 9]
    [finding] = told[5]
    assert (finding.check, finding.step, finding.policy, finding.sound) == (check, 6, "stop", sound)
    assert finding.problem.startswith(tuple(wrong)) and "for 3 steps past" in finding.problem and finding.remedy


def test_a_step_without_a_number_neither_ends_nor_prolongs_a_trend():
    health = make_health(low_entropy={"steps": 2})
    told = [health.observe(1, {"policy/entropy": value}) for value in (0.0, math.nan, 0.0, math.nan)]
    assert list(map(len, told)) == [0, 0, 1, 0]


def test_a_reward_without_weight_may_be_constant():
    health = Health(HealthConfig.model_validate({"constant_reward": {"steps": 1}}), {**WEIGHTS, "recall": 0.0})
    assert health.observe(1, judged(recall=(0.3,) * 4)) == []


def test_a_run_that_goes_on_finds_what_an_uninterrupted_one_finds():
    history = [judged(recall=(0.3,) * 4)] * 5
    whole, resumed = (make_health(constant_reward={"steps": 4}) for _ in range(2))
    expected = [whole.observe(step, row) for step, row in enumerate(history, start=1)]
    resumed.replay(history[:2])
    assert [resumed.observe(step, row) for step, row in enumerate(history[2:], start=3)] == expected[2:]
    assert list(map(len, expected)) == [0, 0, 0, 1, 0]


def test_a_policy_for_one_check_leaves_its_bound():
    assert make_health(mismatch={"policy": "warn"}).config.mismatch.bound == HealthConfig().mismatch.bound


def test_the_whole_program_stops_with_a_checkpoint_when_a_reward_says_nothing(tmp_path):
    """A policy that never learned to write writes nothing that is language: each caption gets a 0 for it."""
    output = tmp_path / "run"
    overrides = ["warmup.steps=0", "data.eval_size=2", "health.constant_reward={policy: stop, steps: 2}"]
    done = subprocess.run(command(output, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    line = "error: step 2, health.constant_reward: reward/linguistic_std is 0, for 2 steps past 1e-06: all captions get"
    assert line in done.stderr and "Traceback" not in done.stderr.partition("error: ")[0]
    assert [row.get("health/constant_reward") for row in rows(output)] == [None, 0.0]
    assert (output / "checkpoints" / "latest").read_text().strip() == "step_000002"
