"""Recorded captions for people: as text on the console, and as a page in the report's style with their pictures."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from balcap_mega.data.records import CaptionDataset, CaptionRecord
from balcap_mega.errors import UserError
from balcap_mega.training.folder import RunFolder, write_text
from balcap_mega.training.heldout import HeldOutResult, read_result
from balcap_mega.training.observe.pages import (
    VERDICTS,
    WORDS,
    ShownCaption,
    data_url,
    score_words,
    template,
    units,
)
from balcap_mega.training.observe.report import SAMPLES
from balcap_mega.training.record.format import RecordedCaption, RecordedGroup, read_step, steps_on_record

logger = logging.getLogger(__name__)

THUMBNAIL = 208  # pixels
MOST_CARDS = 64  # images of a page
WORST = 20  # captions


@dataclass(frozen=True)
class Found:
    """Captions of one image in one step."""

    step: int
    group: RecordedGroup
    captions: tuple[RecordedCaption, ...]


def find(folder: Path, step: int | None, record: str | None, worst: bool) -> list[Found]:
    """The captions of a step (the last one, unless a record is asked for: then all steps that have it).

    worst: of them the `WORST` captions of the lowest reward (the mean of their components), the lowest first
    Raises UserError where nothing is found.
    """
    there = steps_on_record(folder)
    steps = [step] if step is not None else (there if record is not None else there[-1:])
    if not steps:
        read_step(folder, 1)  # says what is missing
    found = [
        Found(number, group, group.captions)
        for number in steps
        for group in read_step(folder, number).groups
        if record in (None, group.record)
    ]
    if not found:
        where = f"step {step}" if step is not None else f"the {len(steps)} steps on record"
        raise UserError(f"--record {record} is not in {where}", remedy="leave --record out to see which are")
    if worst:
        single = [Found(each.step, each.group, (caption,)) for each in found for caption in each.captions]
        found = sorted(single, key=lambda each: each.captions[0].reward)[:WORST]
    return found


def as_text(found: Iterable[Found]) -> Iterator[str]:
    """Lines for a console."""
    for each in found:
        yield f"step {each.step}  {each.group.record}"
        for caption in each.captions:
            yield f"  [{caption.number}] {caption.text}"
            for line in (_scores(caption), _numbers(caption)):
                yield "      " + ", ".join(f"{name} {value}" for name, value in line)
            for assertion in caption.judgement.assertions or ():
                yield f"      {WORDS[assertion.verdict]}: {assertion.text}"
            for name, covered in (("covered", True), ("missed", False)):
                if texts := [unit.text for unit in units(caption.judgement) if unit.covered is covered]:
                    yield f"      {name}: {'; '.join(texts)}"


def _scores(caption: RecordedCaption) -> list[tuple[str, str]]:
    """What it was worth, (name, value)."""
    return [
        *score_words(caption.judgement, caption.components),
        ("advantage", f"{caption.advantage:+z.2f}"),
        ("by component", ", ".join(f"{name} {value:+z.2f}" for name, value in caption.advantages.items())),
    ]


def _numbers(caption: RecordedCaption) -> list[tuple[str, str]]:
    """What else is known of it; what is not is left out."""
    engine, trained = f"engine {caption.mean_logprob:.3f}", caption.trained_logprob
    return [
        ("length ratio", f"{caption.length_ratio:.2f}{', gated' if caption.gated else ''}"),
        ("logprob a token", engine if trained is None else f"{engine}, trainer {trained:.3f}"),
        *([] if caption.staleness is None else [("staleness", f"{caption.staleness:.2g}")]),
        *([] if caption.finished else [("cut", f"at {len(caption.token_ids)} tokens")]),
    ]


def write_page(path: Path, name: str, title: str, found: Sequence[Found], dataset: CaptionDataset | None) -> None:
    """The page of these captions. dataset: what they were trained on, for pictures and references; None without."""
    cards = []
    for each in found[:MOST_CARDS]:
        captions = [
            ShownCaption.of(
                f"Step {each.step}, caption {caption.number}",
                caption.text,
                caption.judgement,
                [*_scores(caption), *_numbers(caption)],
            )
            for caption in each.captions
        ]
        cards.append(_card(each.group.record, _same(dataset, each.group), captions))
    note = f"The first {MOST_CARDS} of {len(found)} images." if len(found) > MOST_CARDS else ""
    _write(path, name, title, note, cards)


def write_changes(
    folder: RunFolder, before: HeldOutResult, after: HeldOutResult, dataset: CaptionDataset
) -> str | None:
    """`folder.changes`: captions of the first held-out images before, in each evaluation between, and after.

    Returns its name, or None where no evaluation between is on record. One that cannot be read is left out.
    """
    between = list(_between(folder))
    if not between:
        return None
    moments = [("Before", before), *((f"After step {steps}", result) for steps, result in between), ("After", after)]
    cards = []
    for place, first in enumerate(before.captions[:SAMPLES]):
        same = [(when, result.captions[place]) for when, result in moments if place < len(result.captions)]
        record = dataset[first.record_index]
        cards.append(_card(record.id, record, [ShownCaption.held_out(when, caption) for when, caption in same]))
    _write(folder.changes, folder.root.resolve().name, "How captions changed", "The same held-out images.", cards)
    return folder.changes.name


def _between(folder: RunFolder) -> Iterator[tuple[int, HeldOutResult]]:
    for path in sorted(folder.rollouts.glob("held_out_*.json")):
        try:
            yield int(path.stem.removeprefix("held_out_")), read_result(path)
        except (UserError, ValueError) as error:
            logger.warning("%s is left out: %s", path, error)


def _same(dataset: CaptionDataset | None, group: RecordedGroup) -> CaptionRecord | None:
    """The record that the captions are of; None where it is not there any more, or is another one."""
    if dataset is None or group.record_index >= len(dataset):
        return None
    record = dataset[group.record_index]
    return record if record.id == group.record and record.pixels == group.pixels else None


def _card(name: str, record: CaptionRecord | None, captions: list[ShownCaption]) -> dict[str, object]:
    return {
        "record": name,
        "image": record and data_url(record.image, THUMBNAIL),
        "reference": record.reference if record else "The data does not hold this record in its place any more.",
        "captions": captions,
    }


def _write(path: Path, name: str, title: str, note: str, cards: list[dict[str, object]]) -> None:
    page = template("captions_template.html").render(name=name, title=title, note=note, cards=cards, verdicts=VERDICTS)
    write_text(path, page)
