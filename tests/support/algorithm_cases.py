"""Random rewards and tokens, and the options that the algorithm's tests and its kernels' share."""

import torch

from balcap_mega.algorithm.batch import RewardBatch, TokenBatch
from balcap_mega.config.schema import AlgorithmConfig

NAMES = ("precision", "recall", "linguistic")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
EVERYTHING = AlgorithmConfig(dual_clip=3.0, kl_weight=0.1, importance_cap=1.05, entropy_weight=0.01)


def random_rewards(
    seed: int, group_sizes: list[int], missing: float = 0.0, names: tuple[str, ...] = NAMES
) -> RewardBatch:
    generator = torch.Generator().manual_seed(seed)
    count = sum(group_sizes)
    return RewardBatch(
        names=names,
        values=torch.rand(len(names), count, generator=generator),
        valid=torch.rand(len(names), count, generator=generator) >= missing,
        lengths=torch.randint(1, 60, (count,), generator=generator).float(),
        reference_lengths=torch.randint(10, 40, (count,), generator=generator).float(),
        group_ids=torch.repeat_interleave(torch.arange(len(group_sizes)), torch.tensor(group_sizes)),
    )


def random_tokens(seed: int, lengths: list[int], vocabulary: int = 50, spread: float = 0.3) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    rows, counts = sum(lengths), torch.tensor(lengths, dtype=torch.int64)
    sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    old = -3 * torch.rand(rows, generator=generator)
    return TokenBatch(
        targets=torch.randint(vocabulary, (rows,), generator=generator),
        sequence_ids=sequence_ids,
        token_index=torch.cat([torch.arange(length) for length in (0, *lengths)]),
        advantages=torch.randn(len(lengths), generator=generator),
        old_logprobs=old,
        rollout_logprobs=old + 0.1 * torch.randn(rows, generator=generator),
        reference_logprobs=old + spread * torch.randn(rows, generator=generator),
        sequence_lengths=counts[sequence_ids].float(),
    )
