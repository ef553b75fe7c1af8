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

Saner than the original, always: a refused or cut reply is asked for again by itself before the whole image is; where a
server answers `n` with fewer choices, the missing ones are asked for, while the original would take the mean over fewer
trials in silence; what was answered before a request failed is kept; pictures are sent upright and of bounded size.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from balcap_mega.data.image_files import refuse_outside
from balcap_mega.errors import UserError
from balcap_mega.evaluation.dcscore_scoring import (
    BAD_REPLY,
    Trial,
    facts_in,
    relevant_facts,
    score_image,
    why_void,
)
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import fill, for_each, load_prompts, read_json, read_json_lines, write_json
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.failures import RequestFailed, Unusable
from balcap_mega.rewards.mllm.questions import image_data_url
from balcap_mega.rewards.mllm.replies import Completion, Usage, usable_text

TRIES = 5
MATCHINGS = VERIFICATIONS = 3
TEMPERATURES = {"extract": 1.0, "match": 1.0, "verify": 0.3}
SYSTEM = "You are a helpful assistant."
PROMPTS = {
    "dcscore_extract": ("caption",),
    "dcscore_match": ("predicted_atomic_facts", "oracle_atomic_facts"),
    "dcscore_verify": ("reference_caption", "atomic_facts"),
}
PROTOCOL = 2  # raised when the same replies come to be scored otherwise


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


class Details(TypedDict):
    """What is read of a result's details before it is scored: replies kept from a try that a request ended."""

    __pydantic_config__ = ConfigDict(extra="allow")

    replies: NotRequired[dict[str, list[str]]]


class Result(TypedDict):
    """A file of results, ours or the original's; its replies are read by `score_image`."""

    __pydantic_config__ = ConfigDict(extra="allow")

    valid: bool
    eval_details: NotRequired[Details]


def read_captions(path: str | Path) -> list[Captioned]:
    return read_json_lines(path, "DeCapBench's captions", Captioned)


def check_captions(rows: Sequence[Captioned], annotations: Mapping[str, Annotation]) -> None:
    """Raise UserError for a row that cannot be scored."""
    for number, row in enumerate(rows):
        absent = [key for key in ("image_path", "caption", "oracle_caption") if not isinstance(row.get(key), str)]
        if absent:
            raise UserError(f"captions: row {number} has no {absent[0]}", remedy="write DeCapBench's caption format")
        refuse_outside(row["image_path"], f"captions: row {number}")
        if row["image_path"] not in annotations:
            raise UserError(
                f"captions: row {number}: the annotations have no image {row['image_path']!r}",
                remedy="use the image names of the annotation file",
            )


def read_annotations(path: str | Path) -> dict[str, Annotation]:
    """By image. Raises UserError for an image outside the folder of images."""
    rows = read_json_lines(path, "DeCapBench's oracle facts", Annotation)
    for row in rows:
        refuse_outside(row["image_name"], str(path))
    return {row["image_name"]: row for row in rows}


def oracle_captions(annotations: Mapping[str, Annotation]) -> dict[str, str]:
    """By image. Raises UserError for one without: a row of the captions file has it, so none could be written."""
    found = {name: row["oracle_caption"] for name, row in annotations.items() if "oracle_caption" in row}
    if lacking := sorted(annotations.keys() - found.keys()):
        raise UserError(
            f"the annotations have no oracle_caption of {lacking[0]!r}, which the captions file needs",
            remedy="use annotations with oracle_caption, or write the captions file and leave out --model",
        )
    return found


def as_block(entries: Sequence[dict]) -> str:
    """Facts as the prompts show them: one a line, in the original's own kind of block."""
    return "```json[\n" + "".join(f"  {json.dumps(entry, ensure_ascii=False)},\n" for entry in entries) + "]\n```"


@dataclass(frozen=True)
class DcScoreRun:
    """Captions to score, and where to. `captions` and `annotations` are rows of the original's files."""

    captions: Sequence[Captioned]
    annotations: Mapping[str, Annotation]
    pictures: Pictures
    output: Path
    mend: bool = False
    prompts: Mapping[str, str] = field(default_factory=lambda: load_prompts(PROMPTS))

    async def run(self, client: ChatClient, progress: Callable[[], None] = lambda: None) -> Counter[str]:
        """Judge every caption whose result is not there, or not valid; count those that stay so, by reason."""
        self.output.mkdir(parents=True, exist_ok=True)
        void: Counter[str] = Counter()

        async def one(number: int) -> None:
            if (reason := await self._judge(client, number)) is not None:
                void[reason] += 1
            progress()

        return void + await for_each(range(len(self.captions)), one, client.endpoint.concurrency)

    async def _judge(self, client: ChatClient, number: int) -> str | None:
        """Try until there is a valid result; return why there is none.

        A try is void when its replies cannot be scored, and the next one asks anew, as the original does. Where a
        request fails, the replies so far are kept for the next run. Raises RequestFailed then.
        """
        row, path = self.captions[number], self.output / f"{number}.json"
        if row["image_path"] in self.pictures.unusable:
            return self.pictures.unusable[row["image_path"]]
        earlier: Result = read_json(path, "an earlier result", Result) if path.exists() else {"valid": False}
        if earlier["valid"]:
            return None
        replies = earlier.get("eval_details", {}).get("replies", {})
        for _ in range(TRIES):
            result = self._empty_result(row, replies)
            details = result["eval_details"]
            try:
                await self._try(client, result)
                return None
            except BAD_REPLY as error:
                details["error"] = reason = why_void(error)
                replies = details["replies"] = {}
            except RequestFailed as error:
                details["error"] = str(error)
                raise
            finally:
                write_json(path, result)
        return reason

    def _empty_result(self, row: dict, replies: dict[str, list[str]]) -> dict:
        """A result in the original's format, still without a judgement."""
        facts = [
            {"id": number, "fact": fact}
            for number, fact in enumerate(self.annotations[row["image_path"]]["oracle_facts"])
        ]
        details = {"consume_token": [], "replies": replies}
        return {**row, "human_annotated_oracle_atomic_facts": facts, "eval_details": details, "valid": False}

    async def _try(self, client: ChatClient, result: dict) -> None:
        """Ask what `result` has no replies to yet, and score it. Raises one of BAD_REPLY, or RequestFailed."""
        details = result["eval_details"]
        (reply,) = await self._ask(client, details, "extract", 1, caption=result["caption"])
        details["pred_atomic_facts"] = facts_in(reply)
        relevant_facts(details["pred_atomic_facts"], self.mend)  # void facts are found before more is asked
        shown = [{k: v for k, v in fact.items() if k != "relevance"} for fact in details["pred_atomic_facts"]]
        facts = as_block(result["human_annotated_oracle_atomic_facts"])
        details["mappings_with_human_raw"] = await self._ask(
            client, details, "match", MATCHINGS, predicted_atomic_facts=as_block(shown), oracle_atomic_facts=facts
        )
        details["mappings_with_human"] = [
            {entry["fact"]: entry["matched_oracle_id"] for entry in facts_in(raw)}
            for raw in details["mappings_with_human_raw"]
        ]
        verified = await self._ask(
            client, details, "verify", VERIFICATIONS, image=result["image_path"],
            reference_caption=result["oracle_caption"], atomic_facts=as_block(shown),
        )  # fmt: skip
        details["verified_results"] = [facts_in(text) for text in verified]
        _add_scores(result, score_image(result, self.mend))
        result["valid"] = True
        del details["replies"]  # they stand where the original puts them

    async def _ask(
        self, client: ChatClient, details: dict, name: str, n: int, image: str | None = None, **values: str
    ) -> list[str]:
        """`n` usable replies to one prompt, those that `details` holds already first.

        Many servers answer `n` with fewer choices, most of them with one: what is missing is asked for again.
        """
        replies = details["replies"].setdefault(name, [])
        tokens = 0
        content: Any = fill(self.prompts[f"dcscore_{name}"], **values)
        if image is not None and len(replies) < n:
            picture = {"url": image_data_url(self.pictures.read(image)), "detail": "high"}
            content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": content}]
        while len(replies) < n:
            body = {
                "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}],
                "temperature": TEMPERATURES[name],
                "max_completion_tokens": 2000,
                "n": n - len(replies),
            }
            texts, usage = await client.ask(body, _usable_choices)
            replies += texts[: n - len(replies)]
            if usage is not None:
                tokens += usage.prompt_tokens + 3 * usage.completion_tokens
        details["consume_token"].append(tokens)
        return replies


def _usable_choices(completion: Completion) -> tuple[list[str], Usage | None]:
    """The texts of the choices that are usable. Raises Unusable if none is."""
    texts, problem = [], Unusable("empty")
    for choice in completion.choices:
        try:
            texts.append(usable_text(choice))
        except Unusable as error:
            problem = error
    if not texts:
        raise problem
    return texts, completion.usage


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


def summarize(folder: Path, mend: bool, rows: int) -> dict[str, float]:
    """Scores × 100 over the results of the first `rows` captions, ours or the original's, from the stored replies."""
    results = [
        read_json(path, "a result", Result) for path in (folder / f"{n}.json" for n in range(rows)) if path.exists()
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
        "invalid": rows - len(scored),
    }
