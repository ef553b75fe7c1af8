"""From token ids to microbatches: every rank assigns the step's captions to rows alike, then builds its own rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from balcap_mega.algorithm.batch import Advantages
from balcap_mega.config.schema import PackingConfig, RunConfig
from balcap_mega.data.records import CaptionRecord
from balcap_mega.models.architecture import Architecture
from balcap_mega.models.fp8 import row_multiple
from balcap_mega.models.processing import ProcessedPrompt, PromptProcessor
from balcap_mega.packing.assign import GroupLengths, RowAssignment, assign_rows
from balcap_mega.packing.build import PackingGroup, build_row
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.rollout.rollouts import RolloutGroup, SeenRecord
from balcap_mega.training.microbatch import Microbatch, SequenceValues
from balcap_mega.training.prompts import Prompts


@dataclass(frozen=True)
class Batches:
    """A step's microbatches, for each of its updates u.

    minibatches[u]: those of this rank
    assignments[u]: which row of which rank each caption went to
    """

    minibatches: tuple[tuple[Microbatch, ...], ...]
    assignments: tuple[RowAssignment, ...]


def batch_builder(
    processor: PromptProcessor, config: RunConfig, grid: ProcessGrid, architecture: Architecture
) -> "BatchBuilder":
    """The builder whose rows fit the layout: sequence parallelism cuts them evenly, FP8 GEMMs want whole tiles."""
    pad_to = row_multiple(config.model, config.parallel)
    return BatchBuilder(processor, config.packing, grid, hidden_size=architecture.hidden_size, pad_to=pad_to)


class BatchBuilder:
    """Builds this rank's microbatches; `pad_to` is what a row's length must be a multiple of."""

    def __init__(
        self, processor: PromptProcessor, config: PackingConfig, grid: ProcessGrid, *, hidden_size: int, pad_to: int
    ):
        self.processor, self.config, self.grid = processor, config, grid
        self.hidden_size, self.pad_to = hidden_size, pad_to

    def from_rollouts(
        self, prompts: Prompts, groups: Sequence[RolloutGroup], advantages: Advantages, updates: int
    ) -> Batches:
        """Split the step's P groups into `updates` minibatches of consecutive groups, and pack each.

        Raises UserError, naming both hosts, where this rank loads another record or other pixels than the engine saw.
        """
        values = SequenceValues(advantages.values, [rollout.logprobs for group in groups for rollout in group.rollouts])
        captions = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
        prefixes = [len(group.prompt_token_ids) for group in groups]

        def process(number: int) -> ProcessedPrompt:
            group = groups[number]
            record = prompts[group.place]
            group.seen.refuse_unlike(SeenRecord.of(group.seen.index, record))
            prompt = self.processor(record)
            if tuple(prompt.prompt_token_ids) != group.prompt_token_ids:
                raise RuntimeError(f"{group.seen}: the engine and the trainer see different prompt tokens")
            return prompt

        bounds = [len(groups) * update // updates for update in range(updates + 1)]
        shards = (self.grid.data_rank, self.grid.data_size)
        packed = [
            self._pack(range(start, stop), prefixes, captions, process, values, shards=shards)
            for start, stop in pairwise(bounds)
        ]
        return Batches(tuple(rows for rows, _ in packed), tuple(assignment for _, assignment in packed))

    def to_score(self, prompts: Prompts, groups: Sequence[RolloutGroup]) -> tuple[Microbatch, ...]:
        """This rank's share of some groups, for their logprobs alone; advantages are 0."""
        nothing = torch.zeros(sum(len(group.rollouts) for group in groups))
        [microbatches] = self.from_rollouts(
            prompts, groups, Advantages(nothing, nothing[None], nothing > 0), 1
        ).minibatches
        return microbatches

    def supervised(self, records: Sequence[CaptionRecord], targets: Sequence[str]) -> tuple[Microbatch, ...]:
        """One caption a record, to be imitated; the records are this data-parallel rank's own share."""
        processed = self.processor.many(records)
        captions = [[self.processor.encode_caption(target)] for target in targets]
        values = SequenceValues(torch.zeros(len(records)), [[0.0] * len(tokens) for [tokens] in captions])
        prefixes = [len(prompt.prompt_token_ids) for prompt in processed]
        return self._pack(range(len(records)), prefixes, captions, processed.__getitem__, values, shards=(0, 1))[0]

    def _pack(
        self, numbers, prefixes, captions, process, values, *, shards: tuple[int, int]
    ) -> tuple[tuple[Microbatch, ...], RowAssignment]:
        """Pack the groups `numbers` over shards[1] ranks and build the rows of rank shards[0]."""
        assignment = assign_rows(
            [GroupLengths(prefixes[n], tuple(map(len, captions[n]))) for n in numbers],
            row_tokens=self.config.row_tokens,
            hidden_size=self.hidden_size,
            data_size=shards[1],
            pad_to=self.pad_to,
            shared_prefix=self.config.shared_prefix,
        )
        rows = assignment.rows[shards[0]]
        mine = sorted({piece.group for row in rows for piece in row})
        processed = {number: process(numbers[number]) for number in mine}
        first = _first_sequences(captions)
        groups = {
            number: PackingGroup(
                prompt.prompt_token_ids, prompt.position_ids, captions[numbers[number]], first[numbers[number]]
            )
            for number, prompt in processed.items()
        }
        microbatches = []
        for assigned in rows:
            row = build_row(assigned, groups, pad_to=self.pad_to)
            images = tuple(processed[number].vision for number in row.images)
            microbatches.append(Microbatch(row, images, values.of_row(row)))
        return tuple(microbatches), assignment


def _first_sequences(captions: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The step-wide number of each group's first rollout."""
    counts = torch.tensor([len(group) for group in captions])
    return (counts.cumsum(0) - counts).tolist()
