"""Rules that answer what DCScore, CaptionQA and CapArena-Auto ask a judge, by our prompts."""

import json
import re

from balcap_mega.evaluation.dcscore_scoring import parse_reply


def answer(body: dict, truths: set[str]) -> str | list[str]:
    """The reply to a request that has no JSON schema. truths: statements, plain, that are correct about any image."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    if "\nOptions:\n" in text:
        return _letter(text)
    if "\nCaption Reference:\n" in text:
        return _judgment(text)
    if "### Predicted facts" in text:
        reply = _matching(text)
    elif "### Reference caption" in text:
        facts = parse_reply(text.split("### Atomic facts\n")[-1])
        reply = [{**fact, "verification": int(_plain(fact["fact"]) in truths)} for fact in facts]
    elif "### Atomic facts" in text:
        caption = text.split("### Caption\n")[-1].split("\n\n### Atomic facts")[0]
        reply = [{"fact": sentence, "relevance": 1} for sentence in re.split(r"(?<=\.)\s+", caption.strip())]
    else:
        return "A"
    return [f"```json\n{json.dumps(reply)}\n```"] * body.get("n", 1)


def _letter(text: str) -> str:
    """The first option that the caption names; else "cannot answer", else A."""
    caption = text.split("Caption:\n", 1)[1].split("\n\nQuestion:\n")[0].casefold()
    options = re.findall(r"^([A-Z])\. (.*)$", text.split("\nOptions:\n")[1], re.MULTILINE)
    named = [letter for letter, option in options if option.casefold() in caption]
    return (named + [letter for letter, option in options if option.startswith("Cannot answer")] + ["A"])[0]


def _judgment(text: str) -> str:
    """The caption that shares more words with the reference."""
    first, second, reference = re.fullmatch(
        r"Caption 1:\n(.*)\nCaption 2:\n(.*)\nCaption Reference:\n(.*)\n.*", text.strip(), re.DOTALL
    ).groups()
    shared = [len(set(caption.lower().split()) & set(reference.lower().split())) for caption in (first, second)]
    judgment = "Tie" if shared[0] == shared[1] else f"Caption {1 + (shared[1] > shared[0])} is better"
    return f"Reason: words shared with the reference, {shared[0]} and {shared[1]}\nJudgment: {judgment}"


def _matching(text: str) -> list[dict]:
    """Each predicted fact with the id of the oracle's that says the same."""
    predicted, oracle = map(parse_reply, text.split("### Predicted facts\n")[-1].split("### Oracle facts\n"))
    ids = {_plain(fact["fact"]): fact["id"] for fact in oracle}
    return [{**fact, "matched_oracle_id": ids.get(_plain(fact["fact"]), "None")} for fact in predicted]


def _plain(sentence: str) -> str:
    return sentence.strip(" .\n").casefold()
