"""36 captions of six scenes with what a judge says of them: the fixture that the judge's tokens are counted on.

`data/judge_scenes.json` holds 14 sentences a scene, each with its atomic assertions. A caption is some of a scene's
sentences: seven to fourteen of them, 80 to 250 words and 15 to 45 assertions. Longer captions are split more
coarsely, as judges do.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from balcap_mega.data.questions import ChoiceQuestion
from balcap_mega.rewards.mllm import questions

SCENES = Path(__file__).parent / "data" / "judge_scenes.json"
CAPTIONS = ((7, 6), (8, 5), (9, 5), (10, 4), (12, 3), (14, 3))  # of each scene: sentences, and assertions of each
FACTS_OF_A_SENTENCE = 2  # that the scene's reference states
QUESTIONS, CHOICES = 5, 4  # for utility, as `launch/prepare_data.py questions` asks for them by default
LEFT_OUT = re.compile(r"^(There (is|are) )?(The |A |An )?|\b(a|an|the|is|are|its|his|her)\b ?", re.IGNORECASE)


@dataclass(frozen=True)
class FixtureCaption:
    """One caption: its scene, its sentences joined, its assertions as sentences, and the reference's facts."""

    scene: str
    text: str
    assertions: tuple[str, ...]
    units: tuple[str, ...]
    covered: tuple[bool, ...]


@cache
def captions() -> tuple[FixtureCaption, ...]:
    found = []
    for scene in json.loads(SCENES.read_text(encoding="utf-8")):
        sentences = scene["sentences"]
        units = [unit for sentence in sentences[:12] for unit in sentence["assertions"][:FACTS_OF_A_SENTENCE]]
        for number, (count, most) in enumerate(CAPTIONS):
            chosen = [sentences[(number * 3 + place) % len(sentences)] for place in range(count)]
            said = tuple(assertion for sentence in chosen for assertion in sentence["assertions"][:most])
            known = {assertion for sentence in chosen for assertion in sentence["assertions"]}
            text = " ".join(sentence["text"] for sentence in chosen)
            covered = tuple(unit in known for unit in units)
            found.append(FixtureCaption(scene["name"], text, said, tuple(units), covered))
    return tuple(found)


def telegram(assertion: str) -> str:
    """An assertion as the instructions of `split` ask for it: without articles and forms of "to be"."""
    return LEFT_OUT.sub("", assertion.rstrip(".")).strip()


def verdict(assertion: str) -> str:
    """The same letter for the same assertion, in the proportions of a fair captioner: most are right."""
    place = sha256(telegram(assertion).encode()).digest()[0] / 256
    return "R" if place < 0.8 else "W" if place < 0.92 else "V" if place < 0.97 else "X"


class FixtureJudge:
    """Answers the judge's questions about the fixture's captions, and about longer texts that begin with one."""

    def __init__(self) -> None:
        self._captions = {caption.text: caption for caption in captions()}

    def __call__(self, name: str, data: dict) -> dict:
        return getattr(self, name)(data)

    def split(self, data: dict) -> dict:
        return {"assertions": [telegram(assertion) for assertion in self._caption(data).assertions]}

    def verify(self, data: dict) -> dict:
        return {"verdicts": "".join(f"{number}{verdict(text)}" for number, text in data["statements"].items())}

    def units(self, data: dict) -> dict:
        return {"units": list(next(iter(self._captions.values())).units)}

    def cover(self, data: dict) -> dict:
        covered = self._caption(data).covered
        found = [covered[number % len(covered)] for number in range(len(data["facts"]))]
        return {"verdicts": "".join(f"{number}{'Y' if yes else 'N'}" for number, yes in enumerate(found, start=1))}

    def language(self, data: dict) -> dict:
        return {"clarity": 8, "fluency": 9, "coherency": 7}

    def answer(self, data: dict) -> dict:
        return {"answer": next(iter(data["options"]))}

    def _caption(self, data: dict) -> FixtureCaption:
        text = data["caption"].split(" Take ")[0]
        return self._captions.get(text) or next(iter(self._captions.values()))


def exchanges(caption: FixtureCaption) -> list[tuple[str, dict, str]]:
    """What judging the caption asks and is answered: (question, body, reply), with its scene's name as the picture."""
    judge = FixtureJudge()
    statements = [telegram(assertion) for assertion in dict.fromkeys(caption.assertions)]
    asked: Sequence[questions.Question] = (
        questions.split(caption.text),
        questions.verify(statements, f"data:image/jpeg;base64,{caption.scene}"),
        questions.cover(caption.units, caption.text),
        questions.language(caption.text),
    )
    return [(question.name, question.body, _written(judge(question.name, _data(question.body)))) for question in asked]


def answer_exchanges(caption: FixtureCaption) -> list[tuple[str, dict, str]]:
    """The same for utility: which of four scenes' assertions holds of the picture, for each of QUESTIONS assertions."""
    scenes = json.loads(SCENES.read_text(encoding="utf-8"))
    own = next(place for place, scene in enumerate(scenes) if scene["name"] == caption.scene)
    judge, found = FixtureJudge(), []
    for number in range(QUESTIONS):
        chosen = [scenes[(own + other) % len(scenes)]["sentences"][number] for other in range(CHOICES)]
        choices = tuple(telegram(sentence["assertions"][0]) for sentence in chosen)
        asked = ChoiceQuestion(f"Which of these is in the picture's part {number + 1}?", choices, choices[0])
        question = questions.answer(caption.text, asked, caption.scene)
        found.append((question.name, question.body, _written(judge(question.name, _data(question.body)))))
    return found


def _data(body: dict) -> dict:
    content = body["messages"][-1]["content"]
    return json.loads(content if isinstance(content, str) else content[-1]["text"])


def _written(reply: dict) -> str:
    return json.dumps(reply, separators=(",", ":"))  # as servers that allow no white space write it
