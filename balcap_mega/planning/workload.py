"""What a step computes, in tokens: the captions of its images, and the packed rows that a rank trains on."""

import math
import random
from dataclasses import astuple, dataclass
from functools import lru_cache, reduce
from operator import add

from balcap_mega.config.schema import JudgeQuestion, RunConfig
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.flops import TokenWork, group_work
from balcap_mega.models.fp8 import row_multiple
from balcap_mega.packing.assign import GroupLengths, Row, assign_rows

TEXT_TOKENS = 30
"""Of a prompt beside its image: the chat template and one instruction."""

SCORED_AHEAD = 2 / 8
"""Of a step's captions, that `training.off_policy` scores where they are sampled ahead."""

CAPTION_TOKENS = 175
"""Mean length of a detailed caption, where nothing was measured."""

ASKED_OF_A_CAPTION: dict[JudgeQuestion, int] = {"split": 1, "verify": 1, "cover": 1, "language": 1, "answer": 5}
"""Requests to a judge about one caption. `units` is asked once for all captions of an image, and kept. A record has as
many questions to `answer` as `launch/prepare_data.py questions` asks for."""


@dataclass(frozen=True)
class Workload:
    """One step.

    prompts, group:   images a step and captions of each
    image_tokens:     of one image, as the language model sees it; 0 for a model without images
    prefix_tokens:    of one prompt, its image included
    caption_tokens:   mean length of a response
    max_tokens:       where responses are cut
    updates:          optimizer steps that share the step's captions
    forward_passes:   forward-only passes over all of the step's tokens, for old and reference logprobs
    judge_requests:   the question of each request to the judge about one caption; empty where none is asked
    """

    prompts: int
    group: int
    image_tokens: int
    prefix_tokens: int
    caption_tokens: float
    max_tokens: int
    updates: int
    forward_passes: float
    shared_prefix: bool = True
    judge_requests: tuple[JudgeQuestion, ...] = ()

    @classmethod
    def of(
        cls,
        config: RunConfig,
        architecture: Architecture,
        *,
        image_tokens: int | None = None,
        caption_tokens: float | None = None,
    ) -> "Workload":
        """The step that `config` asks for; `image_tokens` and `caption_tokens` are assumed where not given."""
        if image_tokens is None:
            image_tokens = architecture.family.image_tokens(architecture.config)
        updates = config.optimizer.updates_per_step
        return cls(
            prompts=config.rollout.prompts_per_step,
            group=config.rollout.group_size,
            image_tokens=image_tokens,
            prefix_tokens=image_tokens + TEXT_TOKENS,
            caption_tokens=min(caption_tokens or CAPTION_TOKENS, 0.9 * config.rollout.max_tokens),
            max_tokens=config.rollout.max_tokens,
            updates=updates,
            # The first update's old logprobs are its own; later ones need theirs from before it.
            forward_passes=(config.algorithm.kl_weight > 0)
            + (updates - 1) / updates
            + SCORED_AHEAD * config.rollout.ahead,
            shared_prefix=config.packing.shared_prefix,
            judge_requests=tuple(
                question for question in config.rewards.questions for _ in range(ASKED_OF_A_CAPTION.get(question, 0))
            ),
        )

    @property
    def captions(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of all captions, as throughput over a whole step is reported: each with its own
        prompt."""
        return self.captions * (self.prefix_tokens + self.caption_tokens)

    @property
    def computed(self) -> TokenWork:
        """Of all updates together, each prompt once."""
        lengths = self.lengths(self.captions // self.updates)
        starts = range(0, len(lengths), self.group)
        groups = [group_work(self.prefix_tokens, lengths[start : start + self.group]) for start in starts]
        return reduce(add, groups * self.updates)

    def lengths(self, count: int) -> list[int]:
        """`count` response lengths, ascending: the quantiles of an exponential law of this mean, cut at `max_tokens`.

        One response always runs to the limit: sampled models ramble now and then, and generation waits for that.
        """
        scale = _exponential_scale(self.caption_tokens, self.max_tokens)
        quantiles = (-scale * math.log1p(-(index + 0.5) / count) for index in range(count - 1))
        return [*(max(round(min(length, self.max_tokens)), 1) for length in quantiles), self.max_tokens]


@lru_cache
def _exponential_scale(mean: float, limit: float) -> float:
    """The scale s with E[min(X, limit)] = s·(1 − exp(−limit / s)) = mean for an exponential X, by bisection."""
    low, high = mean, 1e6 * limit
    while high - low > 1e-6 * low:
        middle = (low + high) / 2
        low, high = (middle, high) if middle * -math.expm1(-limit / middle) < mean else (low, middle)
    return low


@dataclass(frozen=True)
class Work:
    """What one row holds, or several together.

    tokens:     padding included
    pairs:      query-key pairs of attention
    responses:  tokens that the LM head predicts
    images:     whose embeddings stand in it
    rows:       how many rows these are
    """

    tokens: float
    pairs: float
    responses: float
    images: float
    rows: float = 1

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(mine * factor for mine in astuple(self)))


@dataclass(frozen=True)
class Rows:
    """What the data-parallel rank with the most to do trains on in one update.

    count:      its microbatches
    total:      all of them together
    largest:    the one with the most tokens
    data_size:  data-parallel ranks
    imbalance:  this rank's work over the mean rank's
    rank:       which of them it is
    """

    count: int
    total: Work
    largest: Work
    data_size: int = 1
    imbalance: float = 1.0
    rank: int = 0

    def encoded(self, tensor: int) -> int:
        """How many images the busiest of `tensor` tensor-parallel ranks encodes: those of each row are dealt out."""
        return self.count * math.ceil(self.total.images / self.count / tensor)


@lru_cache(maxsize=1024)
def pack(workload: Workload, config_rows: tuple[int, int, int, int]) -> Rows:
    """One update's rows on their costliest rank; config_rows: (row_tokens, pad_to, data_size, hidden_size)."""
    row_tokens, pad_to, data_size, hidden_size = config_rows
    lengths = workload.lengths(workload.captions // workload.updates)
    random.Random(0).shuffle(lengths)
    starts = range(0, len(lengths), workload.group)
    groups = [GroupLengths(workload.prefix_tokens, tuple(lengths[start : start + workload.group])) for start in starts]
    assignment = assign_rows(
        groups,
        row_tokens=row_tokens,
        hidden_size=hidden_size,
        data_size=data_size,
        pad_to=pad_to,
        shared_prefix=workload.shared_prefix,
    )
    ranks = [[_work(row, groups, pad_to) for row in rows] for rows in assignment.rows]
    work = [sum(6 * hidden_size * row.tokens + row.pairs for row in rows) for rows in ranks]
    rank = work.index(max(work))
    costliest = ranks[rank]
    return Rows(
        len(costliest),
        reduce(add, costliest),
        max(costliest, key=lambda row: row.tokens),
        data_size,
        assignment.imbalance,
        rank,
    )


def pack_for(config: RunConfig, architecture: Architecture, workload: Workload, world: int) -> Rows:
    """The rows of a run on `world` ranks. Raises UserError where a caption with its prefix does not fit a row."""
    data_size = world // (config.parallel.tensor * config.parallel.pipeline)
    shape = (config.packing.row_tokens, row_multiple(config.model, config.parallel), data_size)
    return pack(workload, (*shape, architecture.hidden_size))


def _work(row: Row, groups: list[GroupLengths], pad_to: int) -> Work:
    pieces = [(groups[piece.group], piece.captions) for piece in row]
    computed = [group_work(group.prefix, [group.captions[index] for index in captions]) for group, captions in pieces]
    work = reduce(add, computed, TokenWork())
    return Work(max(-(-work.tokens // pad_to), 1) * pad_to, work.pairs, work.responses, len(row))
