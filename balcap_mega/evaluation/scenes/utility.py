"""Utility: how well a reader who has the caption alone answers questions about the picture, by CaptionQA's scores.

Questions and reader are its own: those of `balcap_mega.rewards.scenes.answering` can be a reward, whose reader is the
judge's and takes a contradiction for no answer.
"""

from dataclasses import dataclass
from statistics import fmean

from balcap_mega.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    PLACES,
    SIGN_WORDS,
    SIZES,
    TEXTURES,
    Scene,
)
from balcap_mega.evaluation.scenes.account import Account, Thing

CHOICES = {
    "count": MAX_OBJECTS - MIN_OBJECTS + 1,
    "background": len(BACKGROUNDS),
    "kind": len(KINDS),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "texture": len(TEXTURES),
    "word": len(SIGN_WORDS),
    "place": len(PLACES),
}
BONUS = 0.05  # CaptionQA's, for an honest "cannot answer" over a guess


@dataclass(frozen=True)
class Question:
    """What is `attribute` of the thing of that kind, colour and place, where they are given? All None: of the scene.

    "What is at the top left?" gives the place and asks for the kind; "Where is the red circle?" gives kind and colour.
    """

    attribute: str
    answer: str | int
    kind: str | None = None
    colour: str | None = None
    place: str | None = None


def questions(scene: Scene) -> list[Question]:
    """Of the scene its count and background; of each object what is at its place, where it is, and each property, asked
    of "the circle", or of "the circle at the top left" where there are two."""
    asked = [Question("count", len(scene.objects)), Question("background", scene.background)]
    for item in scene.objects:
        alone = sum(other.kind == item.kind for other in scene.objects) == 1
        place = None if alone else item.place
        asked.append(Question("kind", item.kind, place=item.place))
        asked.append(Question("place", item.place, kind=item.kind, colour=item.colour))
        for name in ("colour", "size", "texture", "word"):
            value = getattr(item, name)
            if value not in (None, "plain"):  # no caption says of a plain thing that it is plain
                asked.append(Question(name, value, kind=item.kind, place=place))
    return asked


def utility(account: Account, scene: Scene) -> float:
    """The mean score of the answers, in [0, 1]."""
    return fmean(score(account, question) for question in questions(scene))


def score(account: Account, question: Question) -> float:
    """CaptionQA's: right 1, wrong 0, "cannot answer" 1 / choices + 0.05. A reader who was told several things takes one
    of them at random, so that the score is the share of them that is right."""
    told = answers(account, question)
    if not told:
        return 1 / CHOICES[question.attribute] + BONUS
    return told.count(question.answer) / len(told)


def answers(account: Account, question: Question) -> list[str | int]:
    """Every answer that the reader was given; guesses only where nothing is told plainly."""
    if question.attribute in account.scene:
        values = account.scene[question.attribute]
        return [value for value, guess in values.items() if not guess] or list(values)
    found = [
        value for thing in account.things if _is_asked(thing, question) for value in thing.values(question.attribute)
    ]
    return list(dict.fromkeys(found))


def _is_asked(thing: Thing, question: Question) -> bool:
    """Whether the reader takes the thing for the one that the question is about: nothing told of it speaks against it,
    and where it is given, it was told to be of that kind, or at that place."""
    if question.colour is not None and question.colour not in (thing.values("colour") or [question.colour]):
        return False
    kind, place = thing.values("kind"), thing.values("place")
    if question.kind is None:
        return question.place in place
    return question.kind in kind and question.place in (None, *place)
