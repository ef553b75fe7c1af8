"""The world of `scenes`: a few coloured objects, each in its own quarter of a plain background."""

from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import NamedTuple

KINDS = ("circle", "square", "triangle", "star", "heart", "cross", "sign")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("white", "grey", "black")
SIGN_WORDS = ("go", "bus", "taxi", "stop")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # reading order
RELATIONS = ("left of", "above", "larger than")  # canonical; their converses are read as these, swapped
MIN_OBJECTS, MAX_OBJECTS = 2, len(PLACES)


class Fact(NamedTuple):
    """One atomic fact. `subject` indexes the scene's objects and is None for the scene as a whole.

    attribute: an attribute of `SceneObject`, "count" or "background" of a scene, or one of `RELATIONS`,
    whose value is the index of the other object.
    """

    subject: int | None
    attribute: str
    value: str | int


@dataclass(frozen=True)
class SceneObject:
    """`offset` moves the object off the centre of its quarter, as a fraction of the image's side."""

    kind: str
    colour: str
    size: str
    texture: str
    place: str
    word: str | None = None  # what a sign reads
    offset: tuple[float, float] = (0.0, 0.0)

    @property
    def row(self) -> int:
        return PLACES.index(self.place) // 2

    @property
    def column(self) -> int:
        return PLACES.index(self.place) % 2


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, no two in one place and no two of the same colour and kind."""

    background: str
    objects: tuple[SceneObject, ...]

    def holds(self, fact: Fact) -> bool:
        if fact.subject is None:
            return fact.value == {"count": len(self.objects), "background": self.background}[fact.attribute]
        one = self.objects[fact.subject]
        if fact.attribute not in RELATIONS:
            return getattr(one, fact.attribute) == fact.value
        other = self.objects[int(fact.value)]
        match fact.attribute:
            case "left of":
                return one.column < other.column
            case "above":
                return one.row < other.row
            case _:
                return (one.size, other.size) == ("large", "small")

    @property
    def digest(self) -> int:
        """A hash of everything a caption can tell (offsets left out), equal in every process."""
        told = (self.background, [(o.kind, o.colour, o.size, o.texture, o.place, o.word) for o in self.objects])
        return int.from_bytes(sha256(repr(told).encode()).digest()[:8], "big")


def draw_scene(random: Random) -> Scene:
    count = random.randint(MIN_OBJECTS, MAX_OBJECTS)
    places = sorted(random.sample(PLACES, count), key=PLACES.index)
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    chosen = random.sample(pairs, count)
    return Scene(
        background=random.choice(BACKGROUNDS),
        objects=tuple(_draw_object(random, *pair, place) for pair, place in zip(chosen, places)),
    )


def _draw_object(random: Random, kind: str, colour: str, place: str) -> SceneObject:
    sign = kind == "sign"  # its word must be legible: always large and plain
    size = "large" if sign else random.choice(SIZES)
    reach = 0.012 if size == "large" else 0.05
    return SceneObject(
        kind=kind,
        colour=colour,
        size=size,
        texture="plain" if sign else random.choice(TEXTURES),
        place=place,
        word=random.choice(SIGN_WORDS) if sign else None,
        offset=(random.uniform(-reach, reach), random.uniform(-reach, reach)),
    )
