"""The kernels in the path of a run: from rewards to an update of the real learner, in Triton's interpreter.

`test_kernels_interpreted.py` starts the process that runs these; elsewhere they are skipped.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from balcap_mega.algorithm import advantages as advantages_module
from balcap_mega.algorithm import lm_head, logits
from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.parallel.groups import destroy_parallel, initialize_parallel
from balcap_mega.parallel.platform import Platform
from tests.support.algorithm_cases import random_rewards
from tests.test_learner import PARALLEL, make_batch, make_learner

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

NO_WORK = ("empty", "view", "detach", "alias", "slice", "select", "as_strided", "expand", "reshape", "t.default")


@pytest.fixture(scope="module")
def layout():
    torch.set_num_threads(1)
    yield initialize_parallel(PARALLEL, Platform.resolve("cpu"))
    destroy_parallel()
    torch.distributed.destroy_process_group()


class Launches:
    """A kernel that writes its name down at every launch, and what PyTorch itself computes in between."""

    def __init__(self, kernel, name: str, told: list[str]):
        self.kernel, self.name, self.told = kernel, name, told

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.told.append(self.name)
            with _disable_current_modes():  # the interpreter's own way of doing things
                return self.kernel[grid](*arguments, **options)

        return launch


class Operations(TorchDispatchMode):
    """Writes down PyTorch's operations that would be launches on a GPU."""

    def __init__(self, told: list[str]):
        super().__init__()
        self.told = told

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not any(word in str(function) for word in NO_WORK):
            self.told.append(str(function))
        return function(*arguments, **(options or {}))


def train(folder, layout, updates: int = 5) -> list[torch.Tensor]:
    """From a step's rewards to its update, as `Trainer.step` goes about it; returns the weights."""
    # Adam divides by the gradient's size: without this eps it would blow up what rounds differently near zero.
    learner = make_learner(folder, eps=1e-4, dual_clip=3.0, entropy_weight=0.01)
    for number in range(updates):
        rewards = random_rewards(number, [2, 2], missing=0.2)
        advantages = compute_advantages(rewards.to(learner.platform.device), learner.algorithm)
        [microbatches] = make_batch(folder, learner, layout, advantages=advantages)
        learner.update(microbatches)
    return [parameter.detach().clone() for parameter in learner.policy.parameters()]


def test_a_step_is_computed_by_its_kernels_alone(tiny_checkpoint, layout, monkeypatch):
    """One launch makes the advantages, one a chunk the loss and d-logprobs, and PyTorch computes nothing there.

    Five updates by the kernels end at the weights of five by the references.
    """
    from balcap_mega.kernels import advantages, policy_loss
    from balcap_mega.kernels import lm_head as head_kernels

    folder = tiny_checkpoint("qwen2_5_vl")
    monkeypatch.setitem(logits.CHUNK_BYTES, "cpu", 2**14)  # several chunks
    monkeypatch.delenv("TRITON_INTERPRET")
    expected = train(folder, layout)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    told: list[str] = []
    for module, kernel in (
        (advantages, "advantages_kernel"), (policy_loss, "policy_loss_kernel"), (head_kernels, "statistics_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, kernel, Launches(getattr(module, kernel), kernel, told))

    def watched(function):
        def call(*arguments, **options):
            with Operations(told):
                return function(*arguments, **options)

        return call

    monkeypatch.setattr(lm_head, "policy_loss_terms", watched(lm_head.policy_loss_terms))
    monkeypatch.setattr(advantages_module, "_kernel_advantages", watched(advantages_module._kernel_advantages))
    advantages._constant.cache_clear()
    rewards = random_rewards(9, [2, 2])
    compute_advantages(rewards, make_learner(folder).algorithm)  # weights go to the device once a run
    told.clear()
    found = train(folder, layout)
    assert set(told) == {"advantages_kernel", "statistics_kernel", "policy_loss_kernel"}  # and no operation of PyTorch
    steps = " ".join(told).split("advantages_kernel ")[1:]
    assert len(steps) == 5
    for step in steps:
        launches = step.split()
        chunks = len(launches) // 2
        assert chunks >= 2 and launches == ["statistics_kernel", "policy_loss_kernel"] * chunks
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    start = make_learner(folder).policy.parameters()
    moved = [(after - before).abs().max() for after, before in zip(found, start, strict=True)]
    assert max(moved) > 1e-2  # past what they may differ by
