"""DCScore of DeCapBench (arXiv 2503.07906): atomic facts of a caption, verified and matched to facts by people.

Reads and writes the formats of MAGAer13/DeCapBench: captions as JSON Lines of {image_path, caption, oracle_caption},
annotations as JSON Lines of {image_name, oracle_facts}, and results as one `<row>.json` an image, which the original's
compute_results.py reads.

For the same replies the scores are the original's. Its quirks, each mended by `mend=True`:
- recall over the relevant facts weighs a match by all facts that share it, relevant or not;
- a matched id counts as given: "3" and 3 are two facts of the oracle, and so is an id that the oracle does not have;
- a caption without facts, or without relevant ones, is invalid rather than worth 0, and so is a fact that the judge
  gave no relevance (taken for relevant when mended);
- an image still invalid after five tries is dropped from the mean (also when mended; it is counted in the summary).
"""

import ast
import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from balcap_mega.data.files import refuse_outside
from balcap_mega.errors import UserError
from balcap_mega.evaluation.session import (
    fill,
    for_each,
    load_prompt,
    read_json,
    read_json_lines,
    read_picture,
    write_json,
)
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.failures import RequestFailed

TRIES = 5
MATCHINGS = VERIFICATIONS = 3
LONGEST_REPLY = 200_000  # characters; no list of facts comes near
SYSTEM = "You are a helpful assistant."
# What a reply of the wrong shape raises where it is read: the try is void, as in the original.
BAD_REPLY = (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError)


class Captioned(TypedDict):
    """A row of the captions file."""

    __pydantic_config__ = ConfigDict(extra="allow")

    image_path: str
    caption: str
    oracle_caption: str


class Annotation(TypedDict):
    """What is read of a row of the annotations."""

    image_name: str
    oracle_facts: list[str]
    oracle_caption: NotRequired[str]


class Result(TypedDict):
    """A file of results, ours or the original's; its replies are read by `score_image`."""

    __pydantic_config__ = ConfigDict(extra="allow")

    valid: bool


def read_captions(path: str | Path) -> list[Captioned]:
    return read_json_lines(path, "DeCapBench's captions", Captioned)


def read_annotations(path: str | Path) -> dict[str, Annotation]:
    """By image. Raises UserError for an image outside the folder of images."""
    rows = read_json_lines(path, "DeCapBench's oracle facts", Annotation)
    for row in rows:
        refuse_outside(row["image_name"], str(path))
    return {row["image_name"]: row for row in rows}


@dataclass(frozen=True)
class Trial:
    """Scores of one verification with one matching, over all facts and over the relevant ones."""

    precision: float
    recall: float
    precision_relevant: float
    recall_relevant: float

    @property
    def f1(self) -> float:
        return _f1(self.precision, self.recall)

    @property
    def f1_relevant(self) -> float:
        return _f1(self.precision_relevant, self.recall_relevant)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall + 1e-8)


def score_trial(
    predicted: Sequence[dict], oracle_size: int, verification: Sequence[dict], matching: Sequence[dict], mend: bool
) -> Trial:
    """Score one pair of replies. Raises one of BAD_REPLY where the original would call the image invalid.

    Recall = (verified unmatched facts + Σ over verified matched ones of 1 / facts matched to the same oracle fact)
    / (oracle facts + verified unmatched facts).
    """
    matched_id = {entry["fact"]: _oracle_id(entry["matched_oracle_id"], oracle_size, mend) for entry in matching}
    if set(matched_id) != {entry["fact"] for entry in verification}:
        raise ValueError("matching and verification are about different facts")
    relevant_facts = _relevant_facts(predicted, mend)
    relevant = [entry for entry in verification if entry["fact"] in relevant_facts]
    weigh_by = Counter(matched_id[entry["fact"]] for entry in verification)
    relevant_weigh_by = Counter(matched_id[entry["fact"]] for entry in relevant) if mend else weigh_by
    return Trial(
        *_precision_recall(verification, matched_id, weigh_by, oracle_size, mend),
        *_precision_recall(relevant, matched_id, relevant_weigh_by, oracle_size, mend),
    )


def _relevant_facts(predicted: Sequence[dict], mend: bool) -> set[str]:
    return {fact["fact"] for fact in predicted if (fact.get("relevance", 1) if mend else fact["relevance"]) == 1}


def _oracle_id(given: Any, oracle_size: int, mend: bool) -> Any:
    if given is None or given == "None":
        return None
    if not mend:
        return given
    number = int(given) if str(given).strip().isdigit() else -1
    return number if 0 <= number < oracle_size else None


def _precision_recall(
    facts: Sequence[dict], matched_id: dict[str, Any], weigh_by: Counter, oracle_size: int, mend: bool
) -> tuple[float, float]:
    if mend and not facts:
        return 0.0, 0.0
    verified = [matched_id[entry["fact"]] for entry in facts if entry["verification"] == 1]
    unmatched = sum(identity is None for identity in verified)
    covered = sum(1 if identity is None else 1 / weigh_by[identity] for identity in verified)
    return len(verified) / len(facts), covered / (oracle_size + unmatched)


def score_image(result: dict, mend: bool) -> list[Trial]:
    """The trials, verifications × matchings, of one image's stored replies. Raises one of BAD_REPLY for void ones."""
    details = result["eval_details"]
    predicted = details["pred_atomic_facts"]
    oracle_size = len(result["human_annotated_oracle_atomic_facts"])
    matchings = [parse_reply(raw) for raw in details["mappings_with_human_raw"]]
    trials = [
        score_trial(predicted, oracle_size, verification, matching, mend)
        for verification in details["verified_results"]
        for matching in matchings
    ]
    if not trials:
        raise ValueError("no trial")
    return trials


def parse_reply(text: str) -> Any:
    """The list in a judge's reply, read as the original reads it: as Python first, then as JSON; None if neither."""
    if len(text) > LONGEST_REPLY:
        return None
    after = text.split("```json")[-1]
    flat = after.strip("`").strip().strip("\n").replace("\n", "")
    readings = [
        (ast.literal_eval, after.split("```")[0].strip("\n")),
        (ast.literal_eval, flat),
        (json.loads, flat),
        (json.loads, flat.replace("`", "")),
    ]
    for read, source in readings:
        try:
            value = read(source)
            json.dumps(value, ensure_ascii=False).encode()  # Python knows values that no file of results can hold
            return value
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return None


def as_block(entries: Sequence[dict]) -> str:
    """Facts as the prompts show them: one a line, in the original's own kind of block."""
    return "```json[\n" + "".join(f"  {json.dumps(entry, ensure_ascii=False)},\n" for entry in entries) + "]\n```"


@dataclass(frozen=True)
class DcScoreRun:
    """Captions to score, and where to. `captions` and `annotations` are rows of the original's files."""

    captions: Sequence[dict]
    annotations: dict[str, dict]
    image_root: Path
    output: Path
    mend: bool = False
    prompts: Path | None = None

    def check(self) -> None:
        """Raise UserError for a row that cannot be scored."""
        for number, row in enumerate(self.captions):
            absent = [key for key in ("image_path", "caption", "oracle_caption") if not isinstance(row.get(key), str)]
            if absent:
                raise UserError(
                    f"captions: row {number} has no {absent[0]}", remedy="write DeCapBench's caption format"
                )
            if row["image_path"] not in self.annotations:
                raise UserError(
                    f"captions: row {number}: the annotations have no image {row['image_path']!r}",
                    remedy="use the image names of the annotation file",
                )
            refuse_outside(row["image_path"], f"captions: row {number}")
            if not (self.image_root / row["image_path"]).is_file():
                raise UserError(f"no image {self.image_root / row['image_path']}", remedy="check --images")

    async def run(self, client: ChatClient, progress: Callable[[], None] = lambda: None) -> None:
        """Judge every caption whose result is not there, or not valid."""
        self.output.mkdir(parents=True, exist_ok=True)
        prompts = {name: load_prompt(f"dcscore_{name}", self.prompts) for name in ("extract", "match", "verify")}

        async def one(number: int) -> None:
            path = self.output / f"{number}.json"
            if not (path.exists() and read_json(path, "an earlier result", Result)["valid"]):
                for _ in range(TRIES):
                    result = await self._judge(client, prompts, self.captions[number])
                    write_json(path, result)
                    if result["valid"]:
                        break
            progress()

        await for_each(range(len(self.captions)), one, client.endpoint.concurrency)

    async def _judge(self, client: ChatClient, prompts: dict[str, str], row: dict) -> dict:
        """One try at one image, in the original's result format."""
        facts = [
            {"id": number, "fact": fact}
            for number, fact in enumerate(self.annotations[row["image_path"]]["oracle_facts"])
        ]
        details: dict[str, Any] = {"consume_token": []}
        result = {**row, "human_annotated_oracle_atomic_facts": facts, "eval_details": details, "valid": False}
        try:
            (reply,) = await self._ask(client, details, prompts["extract"], 1.0, 1, caption=row["caption"])
            details["pred_atomic_facts"] = parse_reply(reply)
            _relevant_facts(details["pred_atomic_facts"], self.mend)  # void facts are found before more is asked
            shown = [{k: v for k, v in fact.items() if k != "relevance"} for fact in details["pred_atomic_facts"]]
            details["mappings_with_human_raw"] = await self._ask(
                client, details, prompts["match"], 1.0, MATCHINGS,
                predicted_atomic_facts=as_block(shown), oracle_atomic_facts=as_block(facts),
            )  # fmt: skip
            details["mappings_with_human"] = [
                {entry["fact"]: entry["matched_oracle_id"] for entry in parse_reply(raw)}
                for raw in details["mappings_with_human_raw"]
            ]
            verified = await self._ask(
                client, details, prompts["verify"], 0.3, VERIFICATIONS, image=row["image_path"],
                reference_caption=row["oracle_caption"], atomic_facts=as_block(shown),
            )  # fmt: skip
            details["verified_results"] = [parse_reply(text) for text in verified]
            _add_scores(result, score_image(result, self.mend))
            result["valid"] = True
        except (*BAD_REPLY, RequestFailed) as error:
            details["error"] = f"{type(error).__name__}: {error}"
        return result

    async def _ask(
        self,
        client: ChatClient,
        details: dict,
        prompt: str,
        temperature: float,
        n: int,
        image: str | None = None,
        **values,
    ) -> list[str]:
        text = fill(prompt, **values)
        content: Any = text
        if image is not None:
            picture = {"url": _jpeg_url(self.image_root / image), "detail": "high"}
            content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": text}]
        body = {
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
            "temperature": temperature,
            "max_completion_tokens": 2000,
            "n": n,
        }
        completion = await client.ask(body, lambda completion: completion)
        if completion.usage is not None:
            details["consume_token"].append(completion.usage.prompt_tokens + 3 * completion.usage.completion_tokens)
        return [choice.message.content or "" for choice in completion.choices]


def _jpeg_url(path: Path) -> str:
    buffer = io.BytesIO()
    read_picture(path).save(buffer, "jpeg")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _add_scores(result: dict, trials: Sequence[Trial]) -> None:
    """Write the scores under the original's names."""
    names = {
        "precision": "precision",
        "recall": "recall",
        "f1_score": "f1",
        "precision_relevant": "precision_relevant",
        "recall_relevant": "recall_relevant",
        "f1_score_relevant": "f1_relevant",
    }
    means = {theirs: sum(getattr(t, ours) for t in trials) / len(trials) for theirs, ours in names.items()}
    rows = [{theirs: getattr(trial, ours) for theirs, ours in names.items()} for trial in trials]
    averages = {f"{name}_avg": value for name, value in means.items()}
    result["eval_details"]["scores"] = {"trials": rows, **averages}
    result["eval_details"].update(means)


def summarize(folder: Path, mend: bool) -> dict[str, float]:
    """Scores × 100 over a folder of results, ours or the original's, from the replies stored in them."""
    results = [
        read_json(path, "a result", Result)
        for path in sorted(folder.glob("*.json"), key=lambda path: path.name)
        if path.stem.isdigit()
    ]
    scored: list[list[Trial]] = []
    for result in results:
        try:
            if result["valid"] or mend:
                scored.append(score_image(result, mend))
        except BAD_REPLY:
            continue
    if not scored:
        raise UserError(f"{folder}: no image has a valid result", remedy="look at the errors in the result files")

    def mean(value: Callable[[Trial], float]) -> float:
        return 100 * fmean(fmean(map(value, trials)) for trials in scored)

    return {
        "dcscore": mean(lambda t: (t.f1 + t.f1_relevant) / 2),
        "precision": mean(lambda t: t.precision),
        "recall": mean(lambda t: t.recall),
        "f1": mean(lambda t: t.f1),
        "precision_relevant": mean(lambda t: t.precision_relevant),
        "recall_relevant": mean(lambda t: t.recall_relevant),
        "f1_relevant": mean(lambda t: t.f1_relevant),
        "images": len(scored),
        "invalid": len(results) - len(scored),
    }
