"""CapArena-Auto (arXiv 2503.12329): each caption battles that of the baseline assigned to its image.

Reads and writes the formats of njucckevin/CapArena: captions as one JSON object {file name: caption}, the battles file
{file name: {captions: {human, <baseline>}, ref_model}}, and results as a JSON list of battles with "judge_reason" and
"judge", which the original's caparena_auto_scores.py reads.

For the same usable replies the scores are the original's. Its quirks, each mended by `mend=True`:
- a judgment counts only in the exact words of the format; "**Tie**" or "<Caption 1 is better>" is dropped;
- a baseline's score is (wins - losses) / 2, a percentage only if all its 200 battles were judged (mended: divided by
  the battles that were).
The original draws the order of the two captions without a seed; here it follows from `seed`.

Saner than the original, always: pictures are sent upright, of bounded size, as the JPEG that they are declared to be
(the original declares every file a PNG), and a refused or cut reply is no judgment even if it looks like one.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NotRequired, get_args

from pydantic import ConfigDict
from typing_extensions import TypedDict

from balcap_mega.data.image_files import refuse_outside
from balcap_mega.errors import UserError
from balcap_mega.evaluation.pictures import Pictures
from balcap_mega.evaluation.session import fill, for_each, load_prompts, read_json, write_json
from balcap_mega.rewards.mllm.client import ChatClient
from balcap_mega.rewards.mllm.failures import Unusable
from balcap_mega.rewards.mllm.questions import image_data_url
from balcap_mega.rewards.mllm.replies import Completion, usable_text

Baseline = Literal["GPT-4o-0806", "CogVLM2-llama3-chat-19B", "MiniCPM-V2.6-8B"]
BASELINES: tuple[str, ...] = get_args(Baseline)
SHORT_NAMES: dict[str, str] = dict(zip(("gpt", "cog", "cpm"), BASELINES))
FIRST, SECOND, TIE = "Caption 1 is better", "Caption 2 is better", "Tie"
SAVE_EVERY = 20  # battles
PROMPTS = {"caparena": (), "caparena_request": ("caption_1", "caption_2", "reference|caption_ref")}
PROTOCOL = 2  # raised when the same replies come to be scored otherwise


class Entry(TypedDict):
    """One image of the battles file."""

    captions: dict[str, str]
    ref_model: str


class Battle(TypedDict):
    """One battle of a file of results, ours or the original's."""

    __pydantic_config__ = ConfigDict(extra="allow")

    img: str
    source1: str
    source2: str
    caption1: str
    caption2: str
    ref: str
    ref_model: Baseline
    judge: NotRequired[str]


def read_battles(path: str | Path) -> dict[str, Entry]:
    """The battles file. Raises UserError for an image without its two captions, or outside the folder of images."""
    battles = read_json(path, "CapArena-Auto's battles", dict[str, Entry])
    for image, entry in battles.items():
        refuse_outside(image, str(path))
        baseline = SHORT_NAMES.get(entry["ref_model"], entry["ref_model"])
        names = {SHORT_NAMES.get(name, name) for name in entry["captions"]}
        if baseline not in BASELINES or not {"human", baseline} <= names:
            raise UserError(
                f"{path}: {image!r} has no captions of a human and of ref_model, one of {', '.join(BASELINES)}",
                remedy="download caparena_auto_600.json again",
            )
    return battles


def draw_battles(
    battles: dict[str, Entry], captions: dict[str, str], model: str, seed: int, excused: Container[str] = ()
) -> list[dict]:
    """The battles of `model`'s captions, in the original's result format.

    Raises UserError for an image without a caption, unless it is `excused`, and then has no battle.
    """
    order = random.Random(seed)
    drawn = []
    for image, entry in battles.items():
        baseline = SHORT_NAMES.get(entry["ref_model"], entry["ref_model"])
        if baseline == model:
            continue
        ours_comes_first = order.randint(0, 1)
        if image not in captions:
            if image in excused:
                continue
            raise UserError(f"captions: {image} has none", remedy="caption all images of the battles file")
        theirs = entry["captions"].get(entry["ref_model"])
        if theirs is None:
            theirs = {SHORT_NAMES.get(name, name): text for name, text in entry["captions"].items()}[baseline]
        sides = [(baseline, theirs), (model, captions[image])]
        if ours_comes_first:
            sides.reverse()
        (source1, caption1), (source2, caption2) = sides
        drawn.append(
            {
                "img": image,
                "source1": source1,
                "source2": source2,
                "caption1": caption1,
                "caption2": caption2,
                "ref": entry["captions"]["human"],
                "ref_model": baseline,
            }
        )
    return drawn


def read_judgment(reply: str) -> str:
    """What stands behind "Judgment:". Raises Unusable if that, or a reason before it, is absent or blank."""
    reason = re.search(r"Reason:\s*(.+?)\s*Judgment:", reply, re.DOTALL)
    judgment = re.search(r"Judgment:\s*(.+)", reply)
    if not reason or not reason.group(1).strip() or not judgment or not judgment.group(1).strip():
        raise Unusable("no_judgment")
    return judgment.group(1).strip()


def winner(judgment: str, mend: bool) -> str | None:
    """FIRST, SECOND or TIE; None for any other wording."""
    wording = re.sub(r"[^\w ]", "", judgment).strip().lower() if mend else judgment.removesuffix(".")
    return next((one for one in (FIRST, SECOND, TIE) if wording == (one.lower() if mend else one)), None)


@dataclass(frozen=True)
class CapArenaRun:
    """Battles to judge, and the file that keeps them."""

    battles: Sequence[dict]
    pictures: Pictures
    output: Path
    prompts: Mapping[str, str] = field(default_factory=lambda: load_prompts(PROMPTS))

    async def run(self, client: ChatClient, progress: Callable[[], None] = lambda: None) -> Counter[str]:
        """Judge the battles that have no judgment, and write all to `output`; count those that got none, by reason.

        Battles found in `output` are gone on with: their order of captions and their judgments stay.
        """
        battles = list(self.battles)
        if self.output.exists():
            earlier = {battle["img"]: battle for battle in read_json(self.output, "earlier battles", list[Battle])}
            battles = [_same_battle(earlier.get(battle["img"]), battle) for battle in battles]
        unsaved = 0

        async def one(battle: dict) -> None:
            nonlocal unsaved
            if "judge" not in battle:
                reply = await client.ask(self._body(battle), _judged_reply)
                battle.update(judge_reason=reply, judge=read_judgment(reply))
                unsaved += 1
                if unsaved >= SAVE_EVERY:
                    write_json(self.output, battles)
                    unsaved = 0
            progress()

        unusable = self.pictures.unusable
        unseen = Counter(unusable[b["img"]] for b in battles if "judge" not in b and b["img"] in unusable)
        try:
            seen = [battle for battle in battles if battle["img"] not in unusable]
            return unseen + await for_each(seen, one, client.endpoint.concurrency)
        finally:
            write_json(self.output, battles)

    def _body(self, battle: dict) -> dict:
        url = image_data_url(self.pictures.read(battle["img"]))
        names = {"caption_1": battle["caption1"], "caption_2": battle["caption2"], "reference": battle["ref"]}
        text = fill(self.prompts["caparena_request"], **names, caption_ref=battle["ref"])
        return {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": self.prompts["caparena"]}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
                        {"type": "text", "text": text},
                    ],
                },
            ],
            "max_completion_tokens": 1500,
            "top_p": 0.9,
            "temperature": 0.1,
        }


def _same_battle(earlier: dict | None, drawn: dict) -> dict:
    """The earlier battle if it is about the same two captions, else the one drawn now."""

    def sides(battle):
        return {(battle["source1"], battle["caption1"]), (battle["source2"], battle["caption2"])}

    return earlier if earlier is not None and sides(earlier) == sides(drawn) else drawn


def _judged_reply(completion: Completion) -> str:
    reply = usable_text(completion.choices[0])
    read_judgment(reply)
    return reply


def summarize(battles: Sequence[dict], model: str, mend: bool) -> dict[str, float]:
    """Score_avg and the score against each baseline, the captions' mean length in words, and how many counted."""
    points = dict.fromkeys(BASELINES, 0)
    judged = dict.fromkeys(BASELINES, 0)
    for battle in battles:
        won = winner(battle["judge"], mend) if "judge" in battle else None
        if won is None:
            continue
        judged[battle["ref_model"]] += 1
        if won != TIE:
            source = battle["source1"] if won == FIRST else battle["source2"]
            points[battle["ref_model"]] += 1 if source == model else -1
    scores = {name: 100 * points[name] / max(judged[name], 1) if mend else points[name] / 2 for name in BASELINES}
    lengths = [
        len((battle["caption1"] if battle["source1"] == model else battle["caption2"]).split(" ")) for battle in battles
    ]
    return {
        "score_avg": sum(scores.values()) / len(BASELINES),
        **{f"score_{short}": scores[name] for short, name in SHORT_NAMES.items()},
        "length_avg": sum(lengths) / max(len(lengths), 1),
        "battles": len(battles),
        "judged": sum(judged.values()),
    }


def uncounted(battles: Sequence[dict], mend: bool) -> int:
    """Battles whose judgment is in words that do not count."""
    return sum("judge" in battle and winner(battle["judge"], mend) is None for battle in battles)
