"""What someone who sees the caption alone comes to believe."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Thing:
    """A thing that the caption speaks of: for each property the values told, each with whether it is a guess."""

    told: dict[str, dict[str, bool]] = field(default_factory=dict)

    def values(self, name: str) -> list[str]:
        """What is told of a property: what is said plainly, else what is guessed."""
        values = self.told.get(name, {})
        return [value for value, guess in values.items() if not guess] or list(values)

    def fits(self, facts: Iterable[tuple[str, str]]) -> bool:
        """Whether it can be what those facts are told of."""
        return all(value in (self.told.get(name) or (value,)) for name, value in facts)


@dataclass(frozen=True, eq=False)
class Statement:
    """Something told for the first time. `thing` is None for the picture as a whole (count, background)."""

    thing: Thing | None
    attribute: str
    value: str | int | Thing
    guess: bool


@dataclass(frozen=True)
class ReadSentence:
    """idle: words that name nothing visible. whole: it can be read as a sentence. news: it told something new."""

    words: int
    idle: int
    whole: bool
    news: bool


@dataclass
class Account:
    """What a reader has of a caption."""

    things: list[Thing] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    scene: dict[str, dict[str | int, bool]] = field(default_factory=lambda: {"count": {}, "background": {}})
    restated: int = 0  # what is told once more, in whatever words
    sentences: list[ReadSentence] = field(default_factory=list)

    def tell(self, thing: Thing, name: str, value: str, guess: bool, recalled: bool) -> None:
        """recalled: it only says which thing is meant, which is not telling it again"""
        if not self._known(thing.told.setdefault(name, {}), value, guess, recalled):
            self.statements.append(Statement(thing, name, value, guess))

    def tell_of_scene(self, name: str, value: str | int, guess: bool) -> None:
        if not self._known(self.scene[name], value, guess):
            self.statements.append(Statement(None, name, value, guess))

    def relate(self, name: str, one: Thing, other: Thing, guess: bool) -> None:
        if any(s.thing is one and s.attribute == name and s.value is other for s in self.statements):
            self.restated += 1
        else:
            self.statements.append(Statement(one, name, other, guess))

    def _known(self, values: dict, value: str | int, guess: bool, recalled: bool = False) -> bool:
        """Note a value among `values`; whether it stood there already, a guess that is now said plainly included."""
        known = value in values
        self.restated += known and not recalled
        values[value] = guess and values.get(value, True)
        return known
