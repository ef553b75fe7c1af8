"""Triton kernels against float64 references, on a GPU, or in Triton's interpreter where there is none.

The interpreter has to be chosen before Triton is imported, so without a GPU these run in a process of their own:
`test_kernels_interpreted.py` starts it, and here they are skipped.
"""

import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from balcap_mega.algorithm.advantages import compute_advantages
from balcap_mega.algorithm.batch import RewardBatch, TokenBatch
from balcap_mega.algorithm.lm_head import HeadShard, fused_policy_loss, token_logprobs
from balcap_mega.algorithm.policy_loss import policy_loss
from balcap_mega.config.schema import AlgorithmConfig
from tests.support.algorithm_cases import AGGREGATIONS, EVERYTHING, random_rewards, random_tokens
from tests.support.distributed import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's bfloat16 dot and stores are wrong, so bfloat16 is for real devices.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]

pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no CUDA device; test_kernels_interpreted.py runs these in Triton's interpreter",
    ),
]


@pytest.fixture
def seed() -> int:
    """Fresh random input on every run; pytest shows the number when a test fails."""
    number = random.SystemRandom().randrange(2**31)
    print(f"seed {number}")
    return number


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that little input has many of them, and none divides it."""
    from balcap_mega.kernels import advantages, lm_head, policy_loss

    monkeypatch.setattr(advantages, "BLOCK_I", 4)
    monkeypatch.setattr(advantages, "BLOCK_J", 8)
    monkeypatch.setattr(policy_loss, "BLOCK", 4)
    monkeypatch.setattr(policy_loss, "REDUCE_ROWS", 2)
    monkeypatch.setattr(lm_head, "STATISTICS_BLOCK", 32)
    monkeypatch.setattr(lm_head, "GRADIENT_BLOCK", 32)


def on_device(batch):
    """A dataclass of tensors, on the device under test."""
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return type(batch)(**moved)


def reference(function, *args, **kwargs):
    """Call with the kernels off and everything on the CPU."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return function(*args, **kwargs)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach().double(), rtol=rtol, atol=atol)


# Rewards to advantages


SOME_COMPONENTS = {  # K: the weights, and on which of them length control acts
    1: ((2.0,), (0,)),
    3: ((2.0, 0.0, 0.5), (2,)),
    4: ((1.0, 0.3, 0.0, 2.0), (0, 3)),
    8: ((1.0,) * 7 + (0.0,), range(8)),
}


@pytest.mark.parametrize("normalization", ["gdpo", "grpo"])
@pytest.mark.parametrize(
    ("components", "control", "groups"),
    [
        *((3, control, [3, 1, 5, 2]) for control in ("gate", "linear", "none")),
        *((components, "gate", [3, 1, 4]) for components in (1, 4, 8)),
        (4, "linear", [3, 1, 4]),
    ],
)
def test_advantages(components, control, groups, normalization, seed, small_blocks):
    """Of any number of components, with length control on any of them and values missing anywhere."""
    weights, controlled = SOME_COMPONENTS[components]
    names = tuple(f"component_{k}" for k in range(len(weights)))
    config = AlgorithmConfig(
        normalization=normalization,
        length_control=control,
        weights=dict(zip(names, weights)),
        gate={"components": [names[k] for k in controlled]},
    )
    rewards = random_rewards(seed, groups, missing=0.2, names=names)
    order = torch.randperm(sum(groups))  # groups need not stand together
    rewards = RewardBatch(
        rewards.names, rewards.values[:, order], rewards.valid[:, order], rewards.lengths[order],
        rewards.reference_lengths[order], rewards.group_ids[order],
    )  # fmt: skip
    expected = reference(compute_advantages, rewards, config)
    found = compute_advantages(on_device(rewards), config)
    close(found.values, expected.values)
    close(found.per_component, expected.per_component)
    assert torch.equal(found.gated.cpu(), expected.gated)


def test_advantages_are_deterministic(seed, small_blocks):
    rewards = on_device(random_rewards(seed, [3, 1, 5, 2], missing=0.2))
    first, second = (compute_advantages(rewards, AlgorithmConfig()).values for _ in range(2))
    assert torch.equal(first, second)


def test_advantages_are_exact_where_they_must_be(small_blocks):
    rewards = random_rewards(0, [3, 6, 1])
    rewards.values[0], rewards.values[1, :3], rewards.lengths[:] = 0.1, 0.7, 10.0
    rewards.reference_lengths[:] = torch.tensor([5.0, 20.0] * 5)  # both bounds, inclusive
    found = compute_advantages(on_device(rewards), AlgorithmConfig(whiten=False))
    assert not found.per_component[0].any() and not found.per_component[1, :3].any()
    assert not found.per_component[:, 9].any() and not found.gated.any()
    assert found.per_component[2, :9].abs().min() > 0
    nothing = on_device(random_rewards(0, [5], missing=1.0))
    assert not compute_advantages(nothing, AlgorithmConfig(length_control="none")).values.any()


def test_advantages_of_a_large_batch():
    """The block sizes in use, and groups that cross them."""
    rewards = random_rewards(1, [12] if INTERPRETED else [8] * 500 + [700], missing=0.1)
    close(
        compute_advantages(on_device(rewards), AlgorithmConfig()).values,
        reference(compute_advantages, rewards, AlgorithmConfig()).values,
        atol=1e-4,
    )


# Logprobs to loss

BANDS = {"importance_token_band": (0.95, 1.1), "importance_sequence_band": (0.97, 1.02)}
OBJECTIVES = {
    "everything": EVERYTHING,
    "plain": AlgorithmConfig(importance_cap=None),
    "no_reference": AlgorithmConfig(dual_clip=2.0, importance_cap=1.05),
    "sequence": EVERYTHING.model_copy(update={"ratio_level": "sequence"}),
    "token_band": EVERYTHING.model_copy(update=BANDS | {"importance": "token_band"}),
    "sequence_band": EVERYTHING.model_copy(update=BANDS | {"importance": "sequence_band"}),
    "sequence_and_token_band": EVERYTHING.model_copy(
        update=BANDS | {"importance": "token_band", "ratio_level": "sequence"}
    ),
    "sequence_and_sequence_band": EVERYTHING.model_copy(
        update=BANDS | {"importance": "sequence_band", "ratio_level": "sequence"}
    ),
}


def loss_and_gradients(tokens: TokenBatch, logprobs, entropy, config):
    logprobs, entropy = logprobs.detach().clone().requires_grad_(), entropy.detach().clone().requires_grad_()
    loss = policy_loss(logprobs, tokens, config, entropy=entropy, max_response_length=9)
    d_logprobs, d_entropy = torch.autograd.grad(3 * loss.loss_sum, (logprobs, entropy), allow_unused=True)
    return loss, d_logprobs, d_entropy


@pytest.mark.parametrize("lengths", [[5, 1, 7, 3], [1], []])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_policy_loss(objective, aggregation, lengths, seed, small_blocks):
    config = OBJECTIVES[objective].model_copy(update={"aggregation": aggregation})
    tokens = random_tokens(seed, lengths, spread=1.0)
    if objective in ("plain", "no_reference"):
        tokens = TokenBatch(**{**vars(tokens), "reference_logprobs": None})
    logprobs, entropy = tokens.old_logprobs + torch.randn(sum(lengths)), torch.rand(sum(lengths))
    logprobs[:1] += 30.0  # past the bound on the ratio
    exact = TokenBatch(
        **{k: v.double() if k.endswith("logprobs") and v is not None else v for k, v in vars(tokens).items()}
    )
    expected = reference(loss_and_gradients, exact, logprobs.double(), entropy.double(), config)
    found = loss_and_gradients(on_device(tokens), logprobs.to(DEVICE), entropy.to(DEVICE), config)
    scale = float(expected[0].loss_sum.detach().abs()) + 1
    close(found[0].loss_sum / scale, expected[0].loss_sum / scale)
    assert found[0].normaliser.item() == expected[0].normaliser.item()
    assert found[0].normaliser.dtype == torch.int64
    close(found[0].metrics.sums, expected[0].metrics.sums, rtol=1e-4, atol=1e-4)
    close(found[0].metrics.maxima, expected[0].metrics.maxima, rtol=1e-4)
    close(found[1], expected[1], rtol=1e-4)
    if config.entropy_weight:
        close(found[2], expected[2])


def test_policy_loss_is_deterministic_and_survives_reuse():
    tokens, logprobs = on_device(random_tokens(3, [700, 900])), -torch.rand(1600).to(DEVICE)
    first, second = (policy_loss(logprobs, tokens, AlgorithmConfig()) for _ in range(2))
    assert torch.equal(first.loss_sum, second.loss_sum) and torch.equal(first.metrics.sums, second.metrics.sums)


# The LM head


def head_case(rows: int, vocabulary: int, hidden_size: int, scale: float, dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    padded = vocabulary + -vocabulary % 8 + 8
    weight = scale * torch.randn(padded, hidden_size, generator=generator)
    weight[vocabulary:] = 100.0  # padding that would show
    hidden = torch.randn(rows, hidden_size, generator=generator)
    tokens = random_tokens(seed, [rows // 2, rows - rows // 2] if rows > 1 else [rows] * min(rows, 1), vocabulary)
    return hidden.to(dtype), weight.to(dtype), tokens


def exact_loss(hidden, weight, tokens, vocabulary, config, temperature):
    """Loss and gradients by autograd through float64 logits. The old logprobs stand near the current ones."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = F.log_softmax(hidden @ weight[:vocabulary].t() / temperature, dim=-1)
    logprobs, entropy = log_p.gather(1, tokens.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(dim=1)
    noise = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0))
    near = {
        k: (logprobs.detach() + 0.2 * noise).float() for k in ("old_logprobs", "rollout_logprobs", "reference_logprobs")
    }
    tokens = TokenBatch(**{**vars(tokens), **near})
    loss = policy_loss(logprobs, tokens, config, entropy=entropy)
    return tokens, logprobs, entropy, loss, torch.autograd.grad(loss.loss_sum, (hidden, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "scale"), [(5, 123, 1.0), (1, 64, 1.0), (0, 50, 1.0), (7, 53, 60.0), (6, 31, 1e-3)]
)
def test_lm_head(rows, vocabulary, scale, dtype, seed, small_blocks):
    hidden, weight, tokens = head_case(rows, vocabulary, 16, scale, dtype, seed)
    tokens, logprobs, entropy, expected, expected_gradients = reference(
        exact_loss, hidden, weight, tokens, vocabulary, EVERYTHING, 0.8
    )
    hidden, weight = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()
    chunk_bytes = 3 * weight.shape[0] * weight.element_size()
    head = HeadShard(weight, vocabulary, temperature=0.8, chunk_bytes=chunk_bytes)
    # Of the logits: their size, and how finely the dtype holds them.
    precision = 2e-6 if dtype == torch.float32 else 1e-2
    tolerance = precision * (1 + 8 * scale)
    with torch.no_grad():
        forward_only = token_logprobs(hidden, tokens.targets.to(DEVICE), head)
    close(forward_only[0], logprobs, rtol=precision, atol=tolerance)
    close(forward_only[1], entropy, rtol=precision, atol=10 * tolerance)
    if dtype == torch.bfloat16:
        return  # at the clip's edge a rounded ratio changes a gradient altogether; test_lm_head_bfloat16 has gradients
    found = fused_policy_loss(hidden, on_device(tokens), head, EVERYTHING)
    close(found.loss_sum, expected.loss_sum, rtol=1e-4, atol=100 * tolerance)
    for one, other in zip(torch.autograd.grad(found.loss_sum, (hidden, weight)), expected_gradients):
        close(one, other, rtol=1e-3, atol=100 * tolerance)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bfloat16 is wrong")
def test_lm_head_bfloat16(seed):
    """Real blocks, many chunks, gradients without a clip in the way."""
    hidden, weight, tokens = head_case(300, 5003, 256, 0.1, torch.bfloat16, seed)
    config = AlgorithmConfig(clip_low=0.99, clip_high=1e6, importance_cap=None)
    tokens, _, _, expected, expected_gradients = reference(exact_loss, hidden, weight, tokens, 5003, config, 1.0)
    hidden, weight = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    head = HeadShard(weight, 5003, chunk_bytes=128 * weight.shape[0] * 2)
    found = fused_policy_loss(hidden, on_device(tokens), head, config)
    found.loss_sum.backward()
    close(found.loss_sum, expected.loss_sum, rtol=1e-2, atol=1.0)
    for one, other in zip((hidden.grad, weight.main_grad), expected_gradients):
        assert (one.cpu().double() - other).norm() < 2e-2 * other.norm()


def test_extreme_logits_stay_finite():
    vocabulary, rows = 40, 4
    hidden = torch.tensor([[1.0], [-1.0], [3e4], [0.0]], device=DEVICE, requires_grad=True)
    weight = torch.linspace(-1e4, 1e4, vocabulary, device=DEVICE)[:, None].clone().requires_grad_()
    tokens = on_device(random_tokens(5, [rows], vocabulary))
    loss = fused_policy_loss(hidden, tokens, HeadShard(weight, vocabulary), EVERYTHING)
    gradients = torch.autograd.grad(loss.loss_sum, (hidden, weight))
    assert loss.loss_sum.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def shard_of_the_head(vocabulary: int, padded: int):
    group = torch.distributed.group.WORLD
    hidden, weight, tokens = head_case(6, vocabulary, 16, 1.0, torch.float32, 7)
    tokens, _, _, expected, expected_gradients = reference(
        exact_loss, hidden, weight, tokens, vocabulary, EVERYTHING, 1.0
    )
    full = torch.cat([weight[:vocabulary], torch.full((padded - vocabulary, 16), 100.0)])
    shard = full.chunk(group.size())[group.rank()].clone().requires_grad_()
    hidden.requires_grad_()
    head = HeadShard(shard, vocabulary, group, chunk_bytes=4 * shard.shape[0] * 4)
    loss = fused_policy_loss(hidden, tokens, head, EVERYTHING)
    loss.loss_sum.backward()
    torch.distributed.all_reduce(hidden.grad)
    close(loss.loss_sum, expected.loss_sum, rtol=1e-4, atol=1e-4)
    close(hidden.grad, expected_gradients[0], rtol=1e-3, atol=1e-4)
    own = slice(group.rank() * shard.shape[0], min((group.rank() + 1) * shard.shape[0], vocabulary))
    count = max(own.stop - own.start, 0)
    close(shard.grad[:count], expected_gradients[1][own][:count], rtol=1e-3, atol=1e-4)
    return bool(shard.grad[count:].any())


@pytest.mark.skipif(not INTERPRETED, reason="two gloo ranks, on the CPU")
def test_two_vocabulary_parallel_ranks():
    assert launch(2, shard_of_the_head, 53, 64) == [False, False]


def train(fused_by_kernels: bool, device: str) -> list[torch.Tensor]:
    """Five updates of a small network under a head, each with its own rollouts; returns the weights."""
    generator = torch.Generator().manual_seed(0)
    body = torch.nn.Linear(8, 16)
    head_weight = torch.nn.Parameter(0.3 * torch.randn(48, 16, generator=generator))
    with torch.no_grad():
        body.weight.copy_(0.5 * torch.randn(16, 8, generator=generator))
        body.bias.zero_()
    body, head_weight = body.to(device), torch.nn.Parameter(head_weight.detach().to(device))
    optimizer = torch.optim.Adam([*body.parameters(), head_weight], lr=1e-2, eps=1e-3)
    config = AlgorithmConfig(dual_clip=3.0, kl_weight=0.05, entropy_weight=0.01, aggregation="sequence_mean")
    for step in range(5):
        inputs = torch.randn(12, 8, generator=generator).to(device)
        tokens, rewards = random_tokens(step, [3, 2, 4, 3], 45), random_rewards(step, [2, 2])
        tokens, rewards = (TokenBatch(**{k: v.to(device) for k, v in vars(tokens).items()}), RewardBatch(
            rewards.names, *(v.to(device) for k, v in vars(rewards).items() if k != "names")
        ))  # fmt: skip
        head = HeadShard(head_weight, 45, chunk_bytes=5 * 48 * 4)
        with torch.no_grad():
            old, _ = token_logprobs(torch.tanh(body(inputs)), tokens.targets, head)
        drift = 0.1 * torch.randn(12, generator=generator).to(device)
        tokens = replace(
            tokens,
            advantages=compute_advantages(rewards, config).values,
            old_logprobs=old,
            rollout_logprobs=old + drift,
            reference_logprobs=old + 2 * drift,
        )
        loss = fused_policy_loss(torch.tanh(body(inputs)), tokens, head, config)
        optimizer.zero_grad()
        (loss.loss_sum / loss.normaliser).backward()
        optimizer.step()
    return [parameter.detach().cpu() for parameter in (*body.parameters(), head_weight)]


def test_same_weights_after_five_updates():
    for found, expected in zip(train(True, DEVICE), reference(train, False, "cpu")):
        close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="sizes of a real model")
def test_head_of_a_real_model_fits_a_gibibyte():
    """Beyond inputs and gradients, at 8,192 tokens, H = 3,584, V = 152,064 in bfloat16."""
    rows, vocabulary, hidden_size = 8192, 152_064, 3584
    hidden = torch.randn(rows, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(vocabulary, hidden_size, device="cuda")
    tokens = on_device(random_tokens(0, [512] * 16, vocabulary))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused_policy_loss(hidden, tokens, HeadShard(weight, vocabulary), AlgorithmConfig())
    gradient = hidden.numel() * hidden.element_size()
    assert torch.cuda.max_memory_allocated() - before - gradient < 2**30
    assert loss.loss_sum.isfinite()
