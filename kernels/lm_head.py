"""Logits to logprob and entropy, and logits to their gradient in place: the two streaming passes of the LM head.

The GEMMs around them are cuBLAS's; `balcap_mega.algorithm.lm_head` holds the loop over chunks and the reference. For a
row of logits, z = logits / temperature over this rank's columns, the first pass is the online softmax of
arXiv 1805.02867, with the entropy's sum beside it (one read):

    m = max z,    s = Σ exp(z − m),    u = Σ z exp(z − m),    z at the target

and, with these merged over ranks to L = log Σ exp z and H, the second overwrites the row (one read, one write):

    d logit_j = (d_logp · (1[j = target] − p_j) − d_H · p_j · (log p_j + H)) / temperature,    p_j = exp(z_j − L)

Loads are 128 bits wide whatever the vocabulary, where the rows of `logits` stand a multiple of 16 elements apart: a row
is read up to the next one, and what lies past its last column is replaced after the load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS_BLOCK = 4096
GRADIENT_BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def statistics_kernel(logits, targets, local, stride, columns, first_column, rows, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maximum = -float("inf")
    total = tl.zeros([BLOCK], dtype=tl.float32)
    moment = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32) * scale
        shown = tl.where(column < columns, z, -float("inf"))
        larger = tl.maximum(maximum, tl.max(shown))
        weight = tl.exp(shown - larger)
        rescale = tl.exp(maximum - larger)
        total = total * rescale + weight
        moment = moment * rescale + weight * tl.where(column < columns, z, 0.0)
        maximum = larger
    target = tl.load(targets + row) - first_column
    owned = (target >= 0) & (target < columns)
    at_target = tl.load(logits + target, mask=owned, other=0.0).to(tl.float32) * scale
    tl.store(local + row, maximum)
    tl.store(local + rows + row, tl.sum(total))
    tl.store(local + 2 * rows + row, tl.sum(moment))
    tl.store(local + 3 * rows + row, at_target)


@triton.jit
def gradient_kernel(
    logits, targets, log_normaliser, entropy, d_logprobs, d_entropy, stride, columns, first_column, scale,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits += row * stride
    z = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32) * scale
    d_logprob = tl.load(d_logprobs + row) * scale
    log_p = z - tl.load(log_normaliser + row)
    coefficient = -d_logprob
    if ENTROPY:
        coefficient -= tl.load(d_entropy + row) * scale * (log_p + tl.load(entropy + row))
    target = tl.load(targets + row) - first_column
    gradient = coefficient * tl.exp(log_p) + tl.where(column == target, d_logprob, 0.0)
    gradient = tl.where(column < columns, gradient, 0.0)
    tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < stride)


def logit_statistics(logits: Tensor, targets: Tensor, first_column: int, temperature: float) -> Tensor:
    """[4, T] float32: max, Σ exp(z − max), Σ z exp(z − max), and z at the target or 0 where another rank owns it.

    logits: [T, columns], unit stride in a row; targets: [T] int64 vocabulary ids; first_column: this rank's first id
    """
    rows, columns = logits.shape
    local = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        statistics_kernel[(rows,)](
            logits, targets, local, logits.stride(0), columns, first_column, rows, 1 / temperature,
            BLOCK=_block(logits, STATISTICS_BLOCK), num_warps=NUM_WARPS,
        )  # fmt: skip
    return local


def logits_to_gradient_(
    logits: Tensor,
    targets: Tensor,
    log_normaliser: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    first_column: int,
    temperature: float,
) -> Tensor:
    """Overwrite logits [T, columns] with their gradient, in their dtype, and the gap between rows with zeros.

    targets [T] int64, all others [T] float32, d_entropy None where the loss has no entropy term.
    """
    rows, columns = logits.shape
    block = _block(logits, GRADIENT_BLOCK)
    if logits.numel():
        gradient_kernel[(rows, triton.cdiv(columns, block))](
            logits, targets, log_normaliser, entropy, d_logprobs, d_entropy, logits.stride(0), columns, first_column,
            1 / temperature, ENTROPY=d_entropy is not None, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return logits


def _block(logits: Tensor, largest: int) -> int:
    return int(min(largest, triton.next_power_of_2(max(logits.stride(0), 1))))
