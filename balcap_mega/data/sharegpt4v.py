"""ShareGPT4V and LLaVA conversation files.

[{"id": "…", "image": "coco/train2017/….jpg",
  "conversations": [{"from": "human", "value": "What do you see?\n<image>"}, {"from": "gpt", "value": "…"}]}, …]
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic_core import from_json

from balcap_mega.data.files import ImageRow
from balcap_mega.errors import UserError

IMAGE_TOKEN = "<image>"
LONGEST_ID = 200  # characters; ids are only ever shown


def read_sharegpt4v(path: str | Path, prefixes: Sequence[str] = ()) -> list[ImageRow]:
    """The rows of a conversation file: the first question is the prompt, its answer the reference.

    Rows without an image (LLaVA's mixes have some) are left out, and with `prefixes` so are rows whose image path
    starts with none of them. Raises UserError naming the row that is not of the format.
    """
    try:
        entries = from_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={path}: not a readable JSON file ({error})", remedy="name a JSON file") from error
    if not isinstance(entries, list):
        raise UserError(f"data.path={path}: not a JSON list", remedy="use ShareGPT4V's or LLaVA's conversation format")
    return [
        _row(path, number, entry)
        for number, entry in enumerate(entries)
        if not (isinstance(entry, dict) and "image" not in entry)
        and (not prefixes or not isinstance(entry, dict) or str(entry["image"]).startswith(tuple(prefixes)))
    ]


def _row(path: str | Path, number: int, entry: dict) -> ImageRow:
    try:
        image, turns = entry["image"], entry["conversations"]
        question = next(turn["value"] for turn in turns if turn["from"] == "human")
        answer = next(turn["value"] for turn in turns if turn["from"] == "gpt")
        identity = str(entry.get("id", number))[:LONGEST_ID]
        # The chat template of each model puts its own image token where that model was trained to see it.
        prompt, reference = question.replace(IMAGE_TOKEN, "").strip(), answer.strip()
        if not isinstance(image, str) or not prompt or not reference:
            raise ValueError("image, question and answer must be texts that are not empty")
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(
            f"data.path={path}: row {number} is not a conversation about an image ({error!r})",
            remedy='give it "image" and "conversations", a list of {"from": "human" | "gpt", "value": text}',
        ) from error
    return ImageRow(identity, image, prompt, reference)
