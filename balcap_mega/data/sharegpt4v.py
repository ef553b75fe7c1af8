"""ShareGPT4V and LLaVA conversation files.

[{"id": "…", "image": "coco/train2017/….jpg",
  "conversations": [{"from": "human", "value": "What do you see?\n<image>"}, {"from": "gpt", "value": "…"}]}, …]
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from balcap_mega.data.annotations import LeftOut, broken_text, loosely_parsed, read_text_file
from balcap_mega.data.files import ImageRow
from balcap_mega.errors import UserError

log = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
LONGEST_ID = 200  # characters; ids are only ever shown


def read_sharegpt4v(path: str | Path, prefixes: Sequence[str] = ()) -> list[ImageRow | LeftOut]:
    """The rows of a conversation file: the question about the image is the prompt, the answer behind it the reference.

    Rows without an image (LLaVA's mixes have some) are left out and counted in the log; with `prefixes`, so are rows
    whose image path starts with none of them. Rows of several images, and those whose texts hold what is no character,
    are LeftOut. Raises UserError naming the row that is not of the format.
    """
    entries, whole = _entries(path)
    rows: list[ImageRow | LeftOut] = []
    without_image = []
    for number, entry in enumerate(entries):
        images = _images(entry)
        if images is not None and not images:
            without_image.append(number)
            continue
        if prefixes and images is not None and not str(images[0]).startswith(tuple(prefixes)):
            continue
        where = f"data.path={path}: row {number}"
        if not whole and (reason := broken_text(entry)):
            rows.append(LeftOut(where, reason))
        elif images is not None and len(images) > 1:
            rows.append(LeftOut(where, f"has {len(images)} images"))
        else:
            rows.append(_row(where, number, entry, images))
    if without_image:
        log.warning(
            "data.path=%s: %d of %d rows have no image and are left out, e.g. row %d",
            path, len(without_image), len(entries), without_image[0],
        )  # fmt: skip
    return rows


def _entries(path: str | Path) -> tuple[list, bool]:
    """The file's list, and whether all of its texts are sound."""
    data, whole = read_text_file(path, "name a JSON file"), True
    try:
        entries = from_json(data)
    except ValueError as error:
        whole = False
        try:
            entries = loosely_parsed(data)
            if not broken_text(entries):
                raise error
        except ValueError:
            raise UserError(
                f"data.path={path}: not a readable JSON file ({error})", remedy="name a JSON file"
            ) from error
    if not isinstance(entries, list):
        raise UserError(f"data.path={path}: not a JSON list", remedy="use ShareGPT4V's or LLaVA's conversation format")
    return entries, whole


def _images(entry: Any) -> list | None:
    """The row's images, by either name, as a list; None if they are of another form."""
    if not isinstance(entry, dict):
        return None
    value = next((entry[name] for name in ("image", "images") if entry.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def _row(where: str, number: int, entry: dict, images: list | None) -> ImageRow:
    try:
        image, turns = images[0], entry["conversations"]
        asking = [place for place, turn in enumerate(turns) if turn["from"] == "human"]
        about_image = [place for place in asking if IMAGE_TOKEN in turns[place]["value"]]
        place = (about_image or asking)[0]
        question = turns[place]["value"]
        answer = next(turn["value"] for turn in turns[place + 1 :] if turn["from"] == "gpt")
        identity = str(entry.get("id", number))[:LONGEST_ID]
        # The chat template of each model puts its own image token where that model was trained to see it.
        prompt, reference = question.replace(IMAGE_TOKEN, "").strip(), answer.strip()
        if not isinstance(image, str) or not prompt or not reference:
            raise ValueError("image, question and answer must be texts that are not empty")
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{where} is not a conversation about an image ({error!r})",
            remedy='give it "image" and "conversations", a list of {"from": "human" | "gpt", "value": text}',
        ) from error
    return ImageRow(identity, image, prompt, reference)
