"""Reward components to advantages in one launch: length control, group statistics, weights, whitening.

Formulas: BalCapRL (arXiv 2605.07394) and GDPO (arXiv 2601.05242), as written out in
`balcap_mega.algorithm.advantages.compute_advantages`, which is the reference and calls this on CUDA.

One program owns BLOCK_I rollouts and scans all N for the members of their groups, so groups may have any size and stand
in any order. Everything is float32; exactness comes from a shift. With d[i, j] = r[j] − r[i] over the n valid members j
of i's group, r[i] − mean = −Σ_j d[i, j] / n and r[j] − mean = d[i, j] − Σ_j d[i, j] / n, which are exactly 0 in a group
without spread. Whitening needs every rollout: the last program to finish does it, in a fixed order. K is a loop and no
constant of compilation: one program serves any number of components, and its registers do not grow with it.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from balcap_mega.kernels.last_program import arrival_counter, is_last_program

BLOCK_I = 8
BLOCK_J = 512
NUM_WARPS = 4


@triton.jit
def _controlled(batch, k, index, CONTROL: tl.constexpr):
    """Reward, presence and gate of component k at rollouts `index`, after length control; reward 0 where missing."""
    values, valid, lengths, references, _, acts_on, _, _, N, lower, upper, penalty = batch
    inside = index < N
    present = tl.load(valid + k * N + index, mask=inside, other=0) != 0
    reward = tl.where(present, tl.load(values + k * N + index, mask=inside, other=0.0), 0.0)
    gated = index < 0
    if CONTROL != "none":
        acts = tl.load(acts_on + k) != 0
        length = tl.load(lengths + index, mask=inside, other=1.0)
        reference = tl.load(references + index, mask=inside, other=1.0)
        ratio = tl.div_rn(length, tl.maximum(reference, 1.0))
        if CONTROL == "gate":
            gated = ((ratio < lower) | (ratio > upper)) & inside & acts
            reward = tl.where(gated, 0.0, reward)
            present = present | gated
        else:
            reward = tl.where(present & acts, reward - penalty * tl.abs(ratio - 1.0), reward)
    return reward, present, gated


@triton.jit
def _score(batch, k, index, CONTROL: tl.constexpr, SUM_FIRST: tl.constexpr):
    """What is normalised: component k, or for k = K the weighted sum, and which rollouts take part in it."""
    if SUM_FIRST:
        weights, K, N = batch[4], batch[7], batch[8]
        reward = tl.zeros_like(index).to(tl.float32)
        total = reward
        present = index < N
        for component in range(K):
            weight = tl.load(weights + component)
            value, there, _ = _controlled(batch, component, index, CONTROL)
            total += weight * value
            reward = tl.where(component == k, value, reward)
            needed = (tl.zeros_like(value) + weight > 0) | (component == k)
            present = present & (there | ~needed)
        reward = tl.where(k == K, total, reward)
    else:
        reward, present, _ = _controlled(batch, k, index, CONTROL)
    return reward, present


@triton.jit
def _deviation_and_std(
    batch, k, i, group_i,
    CONTROL: tl.constexpr, SUM_FIRST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """score − mean of its group at rollouts i (0 where missing), the group's unbiased std, and who is present."""
    group_ids, N = batch[6], batch[8]
    score_i, present_i = _score(batch, k, i, CONTROL, SUM_FIRST)
    count = tl.zeros([BLOCK_I], dtype=tl.float32)
    shift = tl.zeros([BLOCK_I], dtype=tl.float32)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        score_j, present_j = _score(batch, k, j, CONTROL, SUM_FIRST)
        member = (group_i[:, None] == tl.load(group_ids + j, mask=j < N, other=-2)[None, :]) & present_j[None, :]
        count += tl.sum(tl.where(member, 1.0, 0.0), axis=1)
        shift += tl.sum(tl.where(member, score_j[None, :] - score_i[:, None], 0.0), axis=1)
    shift = shift / tl.maximum(count, 1.0)
    squares = tl.zeros([BLOCK_I], dtype=tl.float32)
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        score_j, present_j = _score(batch, k, j, CONTROL, SUM_FIRST)
        member = (group_i[:, None] == tl.load(group_ids + j, mask=j < N, other=-2)[None, :]) & present_j[None, :]
        deviation = tl.where(member, score_j[None, :] - score_i[:, None] - shift[:, None], 0.0)
        squares += tl.sum(deviation * deviation, axis=1)
    std = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))
    return tl.where(present_i, -shift, 0.0), std, present_i


@triton.jit
def _whiten(advantages, scored, N, epsilon, BLOCK_J: tl.constexpr):
    """A ← (A − mean) / (std + ε) over the scored rollouts, 0 elsewhere; past the first-level cache, which is stale."""
    count = 0.0
    total = 0.0
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        use = tl.load(scored + j, mask=j < N, other=0, cache_modifier=".cg") != 0
        count += tl.sum(tl.where(use, 1.0, 0.0))
        total += tl.sum(tl.where(use, tl.load(advantages + j, mask=j < N, other=0.0, cache_modifier=".cg"), 0.0))
    mean = total / tl.maximum(count, 1.0)
    squares = 0.0
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        use = tl.load(scored + j, mask=j < N, other=0, cache_modifier=".cg") != 0
        deviation = tl.load(advantages + j, mask=j < N, other=0.0, cache_modifier=".cg") - mean
        squares += tl.sum(tl.where(use, deviation * deviation, 0.0))
    std = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))
    for start in range(0, N, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        use = tl.load(scored + j, mask=j < N, other=0, cache_modifier=".cg") != 0
        deviation = tl.load(advantages + j, mask=j < N, other=0.0, cache_modifier=".cg") - mean
        tl.store(advantages + j, tl.where(use, deviation / (std + epsilon), 0.0), mask=j < N)


@triton.jit
def advantages_kernel(
    values, valid, lengths, references, weights, acts_on, group_ids,
    advantages, per_component, gated, scored, counter,
    K, N, lower, upper, penalty, epsilon,
    CONTROL: tl.constexpr, SUM_FIRST: tl.constexpr, WHITEN: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    batch = (values, valid, lengths, references, weights, acts_on, group_ids, K, N, lower, upper, penalty)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = i < N
    group_i = tl.load(group_ids + i, mask=inside, other=-1)
    sum_std = tl.zeros([BLOCK_I], dtype=tl.float32)
    if SUM_FIRST:  # one divisor for all components: the spread of their weighted sum
        sum_std = _deviation_and_std(batch, K, i, group_i, CONTROL, SUM_FIRST, BLOCK_I, BLOCK_J)[1]

    advantage = tl.zeros([BLOCK_I], dtype=tl.float32)
    any_gated = i < 0
    any_scored = i < 0
    for k in range(K):
        weight = tl.load(weights + k)
        deviation, std, present = _deviation_and_std(batch, k, i, group_i, CONTROL, SUM_FIRST, BLOCK_I, BLOCK_J)
        if SUM_FIRST:
            std = sum_std
        normalised = deviation / (std + epsilon)
        tl.store(per_component + k * N + i, normalised, mask=inside)
        advantage += weight * normalised
        any_scored = any_scored | (present & (tl.zeros_like(std) + weight > 0))
        any_gated = any_gated | _controlled(batch, k, i, CONTROL)[2]

    tl.store(advantages + i, advantage, mask=inside)
    tl.store(gated + i, any_gated.to(tl.int8), mask=inside)
    if WHITEN:
        tl.store(scored + i, any_scored.to(tl.int8), mask=inside)
        if is_last_program(counter):
            _whiten(advantages, scored, N, epsilon, BLOCK_J)


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device once a run, not once a step."""
    return torch.tensor(values, dtype=dtype, device=device)


def advantages(
    values: Tensor,
    valid: Tensor,
    lengths: Tensor,
    reference_lengths: Tensor,
    group_ids: Tensor,
    *,
    weights: tuple[float, ...],
    sum_first: bool,
    whiten: bool,
    length_control: str,
    controlled: tuple[bool, ...],
    lower: float,
    upper: float,
    penalty: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [N], per-component advantages [K, N], both float32, and the gate [N] bool; no gradient.

    values [K, N] float32 and valid [K, N] bool, contiguous; lengths and reference_lengths [N] float32; group_ids [N]
    int64; all on one device. weights and controlled: of each of the K components, the latter whether length control
    acts on it.
    """
    components, count = values.shape
    result = torch.empty(count, dtype=torch.float32, device=values.device)
    per_component = torch.empty_like(values)
    gated = torch.empty(count, dtype=torch.bool, device=values.device)
    if count == 0:
        return result, per_component, gated
    scored = torch.empty_like(gated)
    advantages_kernel[(triton.cdiv(count, BLOCK_I),)](
        values, valid.view(torch.int8), lengths, reference_lengths,
        _constant(weights, torch.float32, values.device), _constant(controlled, torch.int8, values.device), group_ids,
        result, per_component, gated.view(torch.int8), scored.view(torch.int8), arrival_counter(values.device),
        components, count, lower, upper, penalty, epsilon,
        CONTROL=length_control, SUM_FIRST=sum_first, WHITEN=whiten,
        BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, num_warps=NUM_WARPS,
    )  # fmt: skip
    return result, per_component, gated
