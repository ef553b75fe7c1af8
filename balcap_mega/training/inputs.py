"""A run is its inputs: the same on every rank at its start, and the same each time it goes on."""

import logging
import os
from dataclasses import replace

import torch
from pydantic import TypeAdapter, ValidationError

from balcap_mega.config.schema import RunConfig
from balcap_mega.data.inputs import RunInputs, missing_on_one, refuse_too_few, refuse_unasked
from balcap_mega.data.records import CaptionDataset
from balcap_mega.errors import UserError
from balcap_mega.models.huggingface.fingerprint import checkpoint_digest
from balcap_mega.parallel.agreement import from_first_rank
from balcap_mega.parallel.host import this_rank
from balcap_mega.training.folder import RunFolder, write_text

log = logging.getLogger(__name__)

_INPUTS = TypeAdapter(RunInputs)


def agreed_inputs(config: RunConfig, folder: RunFolder, train: CaptionDataset, held_out: CaptionDataset) -> RunInputs:
    """What all ranks read alike, and what the run in `folder`, if there is one, began with. A collective.

    The checkpoint is read once a host. Raises UserError, on all ranks, that names what differs and where.
    """
    reads_checkpoint = config.model.path is not None and int(os.environ.get("LOCAL_RANK", "0")) == 0
    inputs = RunInputs.of(train, held_out, checkpoint_digest(config.model.path) if reads_checkpoint else None)
    refuse_unlike_ranks(inputs, getattr(train, "absent", ()))
    refuse_too_few(config, len(train))  # now all ranks have as many
    for dataset in (train, held_out):
        refuse_unasked(config, dataset)
    inputs = from_first_rank(inputs)
    began_with = from_first_rank(read_inputs(folder))
    if began_with is not None:
        refuse_changes(config, began_with, inputs)
    return inputs


def refuse_unlike_ranks(inputs: RunInputs, absent: tuple[str, ...]) -> None:
    """Raise UserError on all ranks, naming two of them with their hosts, unless all have the same. A collective.

    absent: the images that this host lacks, one of which explains a difference best
    """
    world = torch.distributed.get_world_size()
    found: list[tuple[str, RunInputs] | None] = [None] * world
    torch.distributed.all_gather_object(found, (this_rank(), inputs))
    (first, wanted), *others = found
    for other, (name, theirs) in enumerate(others, start=1):
        if theirs.checkpoint is None:  # another rank of that host has read it
            theirs = replace(theirs, checkpoint=wanted.checkpoint)
        if different := wanted.differences(theirs):
            lacks: list[tuple[str, ...] | None] = [None] * world
            mine = absent if torch.distributed.get_rank() in (0, other) else None
            torch.distributed.all_gather_object(lacks, mine)
            raise UserError(
                f"{first} and {name} do not have the same inputs: {'; '.join(different.values())}"
                + missing_on_one((first, lacks[0]), (name, lacks[other])),
                remedy="give all hosts the same data.path, data.image_root and model.path "
                "(torchrun launch/doctor.py compares them)",
            )


def write_inputs(folder: RunFolder, inputs: RunInputs) -> None:
    write_text(folder.inputs, _INPUTS.dump_json(inputs, indent=1).decode())


def read_inputs(folder: RunFolder) -> RunInputs | None:
    """What the run began with, on the first rank; None before it has begun."""
    if torch.distributed.get_rank() > 0 or not folder.inputs.exists():
        return None
    try:
        return _INPUTS.validate_json(folder.inputs.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{folder.inputs} is damaged ({error})", remedy="delete it to take today's inputs for the run's own"
        ) from error


def refuse_changes(config: RunConfig, began_with: RunInputs, inputs: RunInputs) -> None:
    """Raise UserError for what has changed since the run began, unless `accept_changed` names it."""
    changed = began_with.differences(inputs)
    for name in list(changed):
        if name in config.accept_changed:
            log.warning("accept_changed: the run goes on with %s", changed.pop(name))
    if not changed:
        return
    keys = ", ".join(changed)
    # Scores before and after would be of different images, and images held out so far would be trained on.
    accept = "" if "held_out" in changed else f", or go on with them as they are by accept_changed=[{keys}]"
    raise UserError(
        f"output_dir={config.output_dir} began with other inputs, then and now: {'; '.join(changed.values())}",
        remedy=f"bring {'model.path' if keys == 'checkpoint' else 'data.path and its images'} back, or give another "
        f"output_dir{accept}",
    )
