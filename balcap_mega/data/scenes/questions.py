"""Questions about a scene, drawn from all that can be seen in it, with what a reader of captions must look up."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from balcap_mega.data.questions import ChoiceQuestion
from balcap_mega.data.scenes.grammar import NUMBERS, article
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
    SceneObject,
)

CHOICES = 4  # of a question about an attribute that has more values
CONVERSE = {"left of": "right of", "above": "below"}
Named = tuple[tuple[str, str], ...]  # an object as a caption may name it: some of its attributes with their values


@dataclass(frozen=True)
class SceneQuestion(ChoiceQuestion):
    """What is asked, apart from its words.

    attribute: of the thing `about`; "count" or "background" of the scene; "presence" of the kind in `about`; or how
               `about` stands to `other`: "left of", with the choices left of and right of, or "above"
    """

    attribute: str = field(kw_only=True)
    about: Named = field(default=(), kw_only=True)
    other: Named = field(default=(), kw_only=True)


def scene_questions(scene: Scene) -> tuple[SceneQuestion, ...]:
    """Count, background, what is where, each attribute of each object, two kinds present or not, and one relation.

    A pure function of the scene. What no caption mentions is not asked: that an object is plain.
    """
    return tuple(_questions(scene, Random(f"questions {scene.digest}")))


def _questions(scene: Scene, random: Random) -> Iterator[SceneQuestion]:
    def ask(question: str, attribute: str, choices: Sequence[str], answer: str, about: Named = (), **more):
        return SceneQuestion(question, tuple(choices), answer, attribute=attribute, about=about, **more)

    counts = NUMBERS[MIN_OBJECTS : MAX_OBJECTS + 1]
    yield ask("How many objects are there?", "count", counts, NUMBERS[len(scene.objects)])
    yield ask("What colour is the background?", "background", BACKGROUNDS, scene.background)
    kinds = Counter(item.kind for item in scene.objects)
    for item in scene.objects:
        there = (("place", item.place),)
        yield ask(f"What is at the {item.place}?", "kind", _some(random, KINDS, item.kind), item.kind, there)
        alone = kinds[item.kind] == 1
        thing = f"the {item.kind}" if alone else f"the object at the {item.place}"
        about = (("kind", item.kind),) if alone else there
        colours = _some(random, COLOURS, item.colour)
        yield ask(f"What colour is {thing}?", "colour", colours, item.colour, about)
        name = f"the {item.colour} {item.kind}"
        yield ask(f"Where is {name}?", "place", PLACES, item.place, _name(item))
        if item.word is not None:
            yield ask(f"What does {name} read?", "word", SIGN_WORDS, item.word, _name(item))
            continue
        yield ask(f"Is {name} small or large?", "size", SIZES, item.size, _name(item))
        if item.texture != "plain":
            yield ask(f"Is {name} plain, striped or dotted?", "texture", TEXTURES, item.texture, _name(item))
    absent = random.choice([kind for kind in KINDS if kind not in kinds])
    for kind, answer in ((random.choice(list(kinds)), "yes"), (absent, "no")):
        yield ask(f"Is there {article(kind)} {kind}?", "presence", ("yes", "no"), answer, (("kind", kind),))
    yield _relation(*random.sample(scene.objects, 2))


def _relation(one: SceneObject, other: SceneObject) -> SceneQuestion:
    relation = "left of" if one.row == other.row else "above"
    holds = one.column < other.column if relation == "left of" else one.row < other.row
    choices = (relation, CONVERSE[relation])
    return SceneQuestion(
        f"Is the {one.colour} {one.kind} {choices[0]} or {choices[1]} the {other.colour} {other.kind}?",
        choices,
        choices[0 if holds else 1],
        attribute=relation,
        about=_name(one),
        other=_name(other),
    )


def _name(item: SceneObject) -> Named:
    return (("colour", item.colour), ("kind", item.kind))


def _some(random: Random, values: Sequence[str], answer: str) -> list[str]:
    """The answer and a few of the other values, in the values' order."""
    others = random.sample([value for value in values if value != answer], CHOICES - 1)
    return [value for value in values if value in (answer, *others)]
