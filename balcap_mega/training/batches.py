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
from balcap_mega.models.vision import encoded_by
from balcap_mega.packing.assign import GroupLengths, Row, RowAssignment, assign_rows
from balcap_mega.packing.build import PackingGroup, build_row
from balcap_mega.parallel.groups import ProcessGrid
from balcap_mega.rollout.rollouts import RolloutGroup, SeenRecord
from balcap_mega.training.ahead import Due
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


@dataclass(frozen=True)
class PromptLengths:
    """What decides which rank needs a group's picture. row: of its row; image: tokens that stand for its picture"""

    row: GroupLengths
    image: int


def batch_builder(
    processor: PromptProcessor, config: RunConfig, grid: ProcessGrid, architecture: Architecture
) -> "BatchBuilder":
    """The builder whose rows fit the layout: sequence parallelism cuts them evenly, FP8 GEMMs want whole tiles."""
    pad_to = row_multiple(config.model, config.parallel)
    return BatchBuilder(
        processor,
        config.packing,
        grid,
        hidden_size=architecture.hidden_size,
        pad_to=pad_to,
        frozen_vision=config.model.freeze_vision,
    )


class BatchBuilder:
    """Builds this rank's microbatches.

    Every rank builds the same rows as the others of its model-parallel group, but for the pixels: these it has of the
    pictures that its vision tower encodes.

    pad_to:        what a row's length must be a multiple of
    frozen_vision: the policy's tower is
    """

    def __init__(
        self,
        processor: PromptProcessor,
        config: PackingConfig,
        grid: ProcessGrid,
        *,
        hidden_size: int,
        pad_to: int,
        frozen_vision: bool = True,
    ):
        self.processor, self.config, self.grid = processor, config, grid
        self.hidden_size, self.pad_to, self.frozen_vision = hidden_size, pad_to, frozen_vision

    def from_rollouts(
        self, prompts: Prompts, groups: Sequence[RolloutGroup], advantages: Advantages, updates: int
    ) -> Batches:
        """Split the step's P groups into `updates` minibatches of consecutive groups, and pack each.

        Pictures that `prepare` has begun are taken, others begun here. Raises UserError, naming both hosts, where this
        rank loads another record or other pixels than the engine saw.
        """
        return self._from_rollouts(prompts, groups, advantages, updates)

    def prepare(self, prompts: Prompts, groups: Sequence[PromptLengths], updates: int, due: Due) -> None:
        """Have the pictures processed that `from_rollouts` will ask for.

        groups: of each place of the step. What is raised is raised on all ranks alike.
        """
        images = [group.image for group in groups]
        for numbers in _minibatches(len(groups), updates):
            rows = self._assign([groups[number].row for number in numbers], self.grid.data_size)
            mine = self._encoded(rows.rows[self.grid.data_rank], [images[number] for number in numbers])
            prompts.prepare_pictures([numbers[number] for number in sorted(mine)], self.processor, due)

    def to_score(self, prompts: Prompts, groups: Sequence[RolloutGroup]) -> tuple[Microbatch, ...]:
        """This rank's share of some groups, for their logprobs alone; advantages are 0."""
        nothing = torch.zeros(sum(len(group.rollouts) for group in groups))
        advantages = Advantages(nothing, nothing[None], nothing > 0)
        [microbatches] = self._from_rollouts(prompts, groups, advantages, 1, prepared=False).minibatches
        return microbatches

    def _from_rollouts(
        self,
        prompts: Prompts,
        groups: Sequence[RolloutGroup],
        advantages: Advantages,
        updates: int,
        *,
        prepared: bool = True,
    ) -> Batches:
        """prepared: take what `prepare` has begun"""
        values = SequenceValues(advantages.values, [rollout.logprobs for group in groups for rollout in group.rollouts])
        captions = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
        prefixes = [len(group.prompt_token_ids) for group in groups]
        images = [self.processor.image_tokens(group.prompt_token_ids) for group in groups]

        def process(numbers: range, rows: Sequence[Row]) -> dict[int, ProcessedPrompt]:
            encoded = self._encoded(rows, [images[number] for number in numbers])
            places = [groups[numbers[number]].place for number in sorted(encoded)]
            unexpected = [place for place in places if not (prepared and prompts.expects_picture(place))]
            prompts.prepare_pictures(unexpected, self.processor)
            mine = {number: groups[numbers[number]] for number in _groups_in(rows)}
            return {
                number: self._processed(prompts, group) if number in encoded else self._without_pixels(prompts, group)
                for number, group in mine.items()
            }

        shards = (self.grid.data_rank, self.grid.data_size)
        packed = [
            self._pack(numbers, prefixes, captions, process, values, shards=shards)
            for numbers in _minibatches(len(groups), updates)
        ]
        return Batches(tuple(rows for rows, _ in packed), tuple(assignment for _, assignment in packed))

    def _encoded(self, rows: Sequence[Row], images: Sequence[int]) -> set[int]:
        """The groups in `rows`, of which each has so many image tokens, whose pictures this rank's tower encodes."""
        if not self.grid.is_first_stage:
            return set()
        in_rows = [[piece.group for piece in row] for row in rows]
        counts = dict(enumerate(images))
        return encoded_by(self.grid.tensor_rank, self.grid.tensor_size, in_rows, counts, frozen=self.frozen_vision)

    def supervised(self, records: Sequence[CaptionRecord], targets: Sequence[str]) -> tuple[Microbatch, ...]:
        """One caption a record, to be imitated; the records are this data-parallel rank's own share."""
        processed = self.processor.many(records)
        captions = [[self.processor.encode_caption(target)] for target in targets]
        values = SequenceValues(torch.zeros(len(records)), [[0.0] * len(tokens) for [tokens] in captions])
        prefixes = [len(prompt.prompt_token_ids) for prompt in processed]

        def process(numbers: range, rows: Sequence[Row]) -> dict[int, ProcessedPrompt]:
            return dict(enumerate(processed))

        return self._pack(range(len(records)), prefixes, captions, process, values, shards=(0, 1))[0]

    def _processed(self, prompts: Prompts, group: RolloutGroup) -> ProcessedPrompt:
        prompt = prompts.processed(group.place, self.processor)
        group.seen.refuse_unlike(SeenRecord.of(group.seen.index, prompts[group.place]))
        if prompt.prompt_token_ids != group.prompt_token_ids:
            raise RuntimeError(f"{group.seen}: the engine and the trainer see different prompt tokens")
        return prompt

    def _without_pixels(self, prompts: Prompts, group: RolloutGroup) -> ProcessedPrompt:
        """What ranks need that do not encode the picture; of a step that is replayed, its size is looked up."""
        size = group.seen.size or prompts[group.place].image.size
        return self.processor.without_pixels(group.prompt_token_ids, size)

    def _assign(self, groups: Sequence[GroupLengths], data_size: int) -> RowAssignment:
        return assign_rows(
            groups,
            row_tokens=self.config.row_tokens,
            hidden_size=self.hidden_size,
            data_size=data_size,
            pad_to=self.pad_to,
            shared_prefix=self.config.shared_prefix,
        )

    def _pack(
        self, numbers, prefixes, captions, process, values, *, shards: tuple[int, int]
    ) -> tuple[tuple[Microbatch, ...], RowAssignment]:
        """Pack the groups `numbers` over shards[1] ranks and build the rows of rank shards[0].

        process: the prompts of all groups in some rows, by the groups' numbers in `numbers`
        """
        assignment = self._assign([GroupLengths(prefixes[n], tuple(map(len, captions[n]))) for n in numbers], shards[1])
        rows = assignment.rows[shards[0]]
        processed = process(numbers, rows)
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


def _minibatches(groups: int, updates: int) -> list[range]:
    """Consecutive groups for each update."""
    bounds = [groups * update // updates for update in range(updates + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def _groups_in(rows: Sequence[Row]) -> list[int]:
    return sorted({piece.group for row in rows for piece in row})


def _first_sequences(captions: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    """The step-wide number of each group's first rollout."""
    counts = torch.tensor([len(group) for group in captions])
    return (counts.cumsum(0) - counts).tolist()
