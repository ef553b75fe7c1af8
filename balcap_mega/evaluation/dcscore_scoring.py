"""DCScore's arithmetic: from a judge's replies about one image to precision and recall."""

import ast
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_REPLY = 200_000  # characters; no list of facts comes near


class Void(ValueError):
    """A judge's reply that cannot be scored, for a reason fit for counting."""


# What a reply of the wrong shape raises where it is read: the try is void, as in the original.
BAD_REPLY = (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError)


def why_void(error: Exception) -> str:
    """The reason to count one of BAD_REPLY under."""
    if isinstance(error, Void):
        return str(error)
    return "no_facts" if isinstance(error, ZeroDivisionError) else "off_format"


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
        raise Void("other_facts")
    counted = relevant_facts(predicted, mend)
    relevant = [entry for entry in verification if entry["fact"] in counted]
    weigh_by = Counter(matched_id[entry["fact"]] for entry in verification)
    relevant_weigh_by = Counter(matched_id[entry["fact"]] for entry in relevant) if mend else weigh_by
    return Trial(
        *_precision_recall(verification, matched_id, weigh_by, oracle_size, mend),
        *_precision_recall(relevant, matched_id, relevant_weigh_by, oracle_size, mend),
    )


def relevant_facts(predicted: Sequence[dict], mend: bool) -> set[str]:
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


def facts_in(text: str) -> list[dict]:
    """The facts in a judge's reply. Raises Void for one that holds none."""
    facts = parse_reply(text)
    if facts is None:
        raise Void("not_json")
    return facts
