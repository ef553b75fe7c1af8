"""What results were made from, kept beside them, so that results of one making are never taken for those of another."""

import hashlib
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from balcap_mega.config.schema import JudgeEndpoint
from balcap_mega.errors import UserError
from balcap_mega.evaluation.session import read_json, write_json

# Of an endpoint, what decides neither who answers nor what is asked.
NOT_DETERMINING = {"api_key_env", "concurrency", "timeout_seconds", "max_retries"}
ADDRESSES = {"--judge-url", "--base-url"}


def beside(output: Path, what: str) -> Path:
    """The file kept beside the results `output` for `what`, such as "fingerprint.json"."""
    return output.with_name(f"{output.name}.{what}")


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def packaged_prompts(package: str) -> dict[str, str]:
    """The judge prompts that a package ships, by name."""
    folder = files(package).joinpath("prompts")
    return {prompt.name: prompt.read_text(encoding="utf-8") for prompt in folder.iterdir()}


def of_judge(endpoint: JudgeEndpoint, url: str = "--judge-url", model: str = "--judge-model") -> dict[str, Any]:
    """Who answers, and in which dialect it is asked; `url` and `model` are the options that name it."""
    parts = endpoint.model_dump(mode="json", exclude=NOT_DETERMINING, exclude_defaults=True)
    return {url: parts.pop("base_url"), model: parts.pop("model"), "the judge's options": parts}


def claim(
    output: Path, parts: dict[str, Any], pictures: dict[str, str] | None = None, *, judge_moved: bool = False
) -> None:
    """Let `output` be filled with results made from `parts`, or go on with it if it was.

    parts:       everything that determines the results, by the name the user knows it by; a long one as its `digest`
    pictures:    digests of the usable pictures. One that could not be used before has no result yet, so it may be new
    judge_moved: the same judge answers at another address now

    Raises UserError, naming what differs, if `output` holds results of another making, or none says of which.
    """
    path = beside(output, "fingerprint.json")
    if not _has_results(output):
        for stale in ("report.json", "spent.json"):
            beside(output, stale).unlink(missing_ok=True)
        shutil.rmtree(beside(output, "replies"), ignore_errors=True)
        write_json(path, {"parts": parts, "pictures": pictures or {}})
        return
    if not path.exists():
        raise UserError(
            f"{output} holds results, and no {path.name} says what they were made from",
            remedy=f"name another --output, or delete {output} to score anew",
        )
    kept = read_json(path, "the results' fingerprint", dict[str, dict[str, Any]])
    earlier, earlier_pictures = kept.get("parts", {}), kept.get("pictures", {})
    other = [name for name in earlier | parts if earlier.get(name) != parts.get(name)]
    if judge_moved:
        other = [name for name in other if name not in ADDRESSES]
    changed = [name for name, now in (pictures or {}).items() if earlier_pictures.get(name, now) != now]
    if changed:
        other.append(f"picture {changed[0]!r}")
    if other:
        shown = ", ".join(_difference(name, earlier.get(name), parts.get(name)) for name in other)
        moved = "add --judge-moved if the same judge answers there now, " if set(other) <= ADDRESSES else ""
        raise UserError(
            f"{output} holds results of another making: {shown}",
            remedy=f"{moved}name another --output, give what it was made from, or delete {output} to score anew",
        )
    write_json(path, {"parts": parts, "pictures": earlier_pictures | (pictures or {})})


def _has_results(output: Path) -> bool:
    return any(output.iterdir()) if output.is_dir() else output.exists() and output.stat().st_size > 0


def _difference(name: str, was: Any, now: Any) -> str:
    """`name`, with its two values where they are short enough to be read."""
    short = all(isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 64)
                for value in (was, now))  # fmt: skip
    return f"{name} was {was}, now {now}" if short else f"another {name}"
