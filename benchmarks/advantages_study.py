"""When does it pay to normalise each reward on its own? The project's own advantages on captions of known quality.

    python benchmarks/advantages_study.py [--batches 200] [--json FILE]

No policy and no judge: the three qualities of each caption are drawn (standard normal within its group, with a given
correlation), and each reward is a quality on its own scale plus the judge's noise of half a standard deviation. A batch
has 512 captions. The worlds:

    alike      the three rewards have one scale, spread 0.1
    unlike     their spreads are 0.2, 0.1 and 0.02
    settled    one scale, but in 70 % of the groups all captions are alike in the third quality: its reward is noise
    by points  as unlike, but a quality is worth as much as its scale: a point of reward is a point, whichever it is of

The criterion is efficiency: the cosine between the advantages of a batch and the captions' true worth, the sum of
the three qualities (weighted by scale in `by points`), as deviations from the group's mean. A policy that moves its
captions' log-probabilities by a step of given length along the advantages gains just that share of the worth that the
best step of that length would gain. `weakest` is the same with the quality that gains least, in place of the sum.

The methods:

    gdpo    each reward normalised in its group over the valid members, then summed, then whitened (the default)
    grpo    summed, then normalised; a caption that lacks a reward is left out
    +zero   the same with a missing reward taken for 0
    batch   as gdpo, but each reward divided by its spread in the whole batch: no option of this project, for comparison

A difference is that of pairs, on the same batches, with its 95 % confidence interval.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from intervals import Interval, interval
from torch import Tensor

from balcap_mega.algorithm.advantages import EPSILON, compute_advantages
from balcap_mega.algorithm.batch import RewardBatch
from balcap_mega.config.schema import AlgorithmConfig

CAPTIONS = 512
NOISE = 0.5  # of the judge, in standard deviations of a quality
NAMES = ("precision", "recall", "linguistic")
GROUPS, CORRELATIONS, MISSING = (4, 8, 16), (-0.4, 0.0, 0.5, 0.9), (0.0, 0.1, 0.3)
GDPO = AlgorithmConfig(length_control="none")
GRPO = AlgorithmConfig(length_control="none", normalization="grpo")


@dataclass(frozen=True)
class World:
    """Spread of each reward, share of the groups that do not differ in the third quality, and what a quality is worth
    beside the others."""

    spreads: tuple[float, float, float]
    settled: float = 0.0
    worth: tuple[float, float, float] = (1.0, 1.0, 1.0)


WORLDS = {
    "alike": World((0.1, 0.1, 0.1)),
    "unlike": World((0.2, 0.1, 0.02)),
    "settled": World((0.1, 0.1, 0.1), settled=0.7),
    "by points": World((0.2, 0.1, 0.02), worth=(0.2, 0.1, 0.02)),
}


@dataclass(frozen=True)
class Condition:
    world: str
    correlation: float
    missing: float
    group: int


@dataclass(frozen=True)
class Outcome:
    """Efficiency of each method, and by how much gdpo is ahead of it; `weakest` is of gdpo minus grpo."""

    condition: Condition
    efficiency: dict[str, Interval]
    ahead: dict[str, Interval]
    weakest: Interval


def draw(condition: Condition, generator: torch.Generator) -> tuple[Tensor, RewardBatch]:
    """Qualities [3, N] float64 and the rewards that a judge gives for them."""
    world, groups = WORLDS[condition.world], CAPTIONS // condition.group
    correlation = torch.full((3, 3), condition.correlation, dtype=torch.float64).fill_diagonal_(1.0)
    normal = torch.randn(3, CAPTIONS, generator=generator, dtype=torch.float64)
    qualities = torch.linalg.cholesky(correlation) @ normal
    group_ids = torch.arange(groups).repeat_interleave(condition.group)
    settled = torch.rand(groups, generator=generator) < world.settled
    qualities[2].masked_fill_(settled[group_ids], 0.0)
    noise = NOISE * torch.randn(3, CAPTIONS, generator=generator, dtype=torch.float64)
    spreads = torch.tensor(world.spreads, dtype=torch.float64)[:, None]
    rewards = (0.5 + spreads * (qualities + noise)).clamp(0, 1)
    length = torch.ones(CAPTIONS)
    valid = torch.rand(3, CAPTIONS, generator=generator) >= condition.missing
    return qualities, RewardBatch(NAMES, rewards.float(), valid, length, length, group_ids)


def zero_filled(rewards: RewardBatch) -> RewardBatch:
    return replace(rewards, values=rewards.values * rewards.valid, valid=torch.ones_like(rewards.valid))


def scaled_by_batch(rewards: RewardBatch) -> Tensor:
    """Each reward's deviations from its group's mean, over their spread in the whole batch."""
    totals, counts = (
        torch.zeros(3, int(rewards.group_ids.max()) + 1).index_add_(1, rewards.group_ids, entries)
        for entries in (rewards.values * rewards.valid, rewards.valid.float())
    )
    means = (totals / counts.clamp(min=1))[:, rewards.group_ids]
    deviations = (rewards.values - means) * rewards.valid
    spread = (deviations.square().sum(1) / rewards.valid.sum(1).clamp(min=1)).sqrt()
    return (deviations / (spread[:, None] + EPSILON)).sum(0)


METHODS: dict[str, Callable[[RewardBatch], Tensor]] = {
    "gdpo": lambda rewards: compute_advantages(rewards, GDPO).values,
    "grpo": lambda rewards: compute_advantages(rewards, GRPO).values,
    "gdpo+zero": lambda rewards: compute_advantages(zero_filled(rewards), GDPO).values,
    "grpo+zero": lambda rewards: compute_advantages(zero_filled(rewards), GRPO).values,
    "batch": scaled_by_batch,
}


def efficiencies(advantages: Tensor, qualities: Tensor, condition: Condition) -> tuple[float, float]:
    """The advantages' cosine with the captions' worth, and the least of those with the single qualities."""
    in_groups = qualities.view(3, -1, condition.group)
    deviations = (in_groups - in_groups.mean(-1, keepdim=True)).view(3, -1)
    worth = torch.tensor(WORLDS[condition.world].worth, dtype=torch.float64) @ deviations
    return _cosine(advantages, worth), min(_cosine(advantages, quality) for quality in deviations)


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other, dim=0))


def study(condition: Condition, batches: int) -> Outcome:
    """The same batches for every method; those of a condition depend on nothing else."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for _ in range(batches):
        qualities, rewards = draw(condition, generator)
        for name, method in METHODS.items():
            found[name].append(efficiencies(method(rewards), qualities, condition))
    total, weakest = ({name: [pair[at] for pair in pairs] for name, pairs in found.items()} for at in (0, 1))

    def ahead_of(name: str, values: dict[str, list[float]]) -> Interval:
        return interval([own - other for own, other in zip(values["gdpo"], values[name], strict=True)])

    return Outcome(
        condition,
        {name: interval(values) for name, values in total.items()},
        {name: ahead_of(name, total) for name in METHODS if name != "gdpo"},
        ahead_of("grpo", weakest),
    )


def conditions() -> Iterator[Condition]:
    for each in product(WORLDS, CORRELATIONS, MISSING, GROUPS):
        yield Condition(*each)


def table(outcomes: list[Outcome]) -> str:
    """Markdown, in percent."""
    others = [name for name in METHODS if name != "gdpo"]
    heads = ["world", "correlation", "missing", "G", "gdpo", *(f"gdpo − {name}" for name in others), "weakest − grpo's"]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for outcome in outcomes:
        at = outcome.condition
        cells = [at.world, f"{at.correlation:g}", f"{at.missing:.0%}", str(at.group)]
        cells.append(f"{100 * outcome.efficiency['gdpo'].mean:.1f}")
        cells += [_percent(outcome.ahead[name]) for name in others] + [_percent(outcome.weakest)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _percent(difference: Interval) -> str:
    return Interval(100 * difference.mean, 100 * difference.half).format(1, "+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200, help="of each condition")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    outcomes = [study(condition, arguments.batches) for condition in conditions()]
    print(table(outcomes))
    if arguments.json:
        head = {
            "command": f"python benchmarks/advantages_study.py --batches {arguments.batches}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        rows = ",\n".join(json.dumps(_rounded(asdict(outcome))) for outcome in outcomes)
        text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "outcomes": [\n{rows}\n]\n}}\n'
        arguments.json.write_text(text, encoding="utf-8")


def _rounded(tree: dict) -> dict:
    return {
        key: _rounded(value) if isinstance(value, dict) else round(value, 4) if isinstance(value, float) else value
        for key, value in tree.items()
    }


if __name__ == "__main__":
    main()
