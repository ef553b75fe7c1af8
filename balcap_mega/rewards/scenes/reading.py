"""Reads any text as sentences of scene language: noun phrases, places, relations, and words that are none of these."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from balcap_mega.data.scenes.grammar import NUMBERS
from balcap_mega.data.scenes.world import COLOURS, KINDS, SIZES, TEXTURES


def words_of(text: str) -> frozenset[str]:
    """Space-separated words as a set."""
    return frozenset(text.split())


ATTRIBUTES = (
    {word: ("colour", word) for word in COLOURS}
    | {word: ("size", word) for word in SIZES}
    | {word: ("texture", word) for word in TEXTURES}
    | {"big": ("size", "large"), "little": ("size", "small"), "tiny": ("size", "small")}
)
RELATIONS = {  # wording: (canonical relation, whether its two sides change places)
    "left of": ("left of", False),
    "right of": ("left of", True),
    "above": ("above", False),
    "over": ("above", False),
    "below": ("above", True),
    "under": ("above", True),
    "larger than": ("larger than", False),
    "bigger than": ("larger than", False),
    "smaller than": ("larger than", True),
}
_GENERIC_NOUNS = ("object", "shape", "item", "thing", "figure")

# Alternatives, speculation and denial: a sentence with one of them points at nothing in particular.
_DENYING = words_of("no not never without neither nor unlikely")
_UNCOMMITTED = _DENYING | words_of(
    "or either maybe perhaps possibly probably might may could would seems seem appears appear likely unclear unsure if"
)


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True)).replace(" ", r"\s+")


_EVENT = re.compile(
    rf"""
    (?P<place>\b(?:(?:at|in|on)\s+)?(?:the\s+)?(?P<row>top|upper|bottom|lower)[\s-]+(?P<column>left|right)\b
        (?:\s+corner\b)?(?:\s+of\s+the\s+(?:image|picture|scene)\b)?)
    |(?P<background>\b(?:(?:on|against)\s+)?an?\s+(?P<tone>\w+)\s+background\b)
    |(?P<ground>\bthe\s+background\s+is\s+(?P<ground_tone>\w+)\b)
    |(?P<relation>\b(?:to\s+the\s+)?(?P<wording>{_any(RELATIONS)})\b)
    |(?P<reads>\b(?:reads|says)\s+["'“]?(?P<word>\w+)\b["'”]?)
    |(?P<noun_phrase>\b(?:(?P<determiner>an?|the|another|{_any(NUMBERS)}|\d{{1,3}})\s+)?
        (?P<adjectives>(?:(?:{_any(ATTRIBUTES)})\b(?:\s*,\s*|\s+and\s+|\s+))*)
        (?P<noun>{_any((*KINDS, *_GENERIC_NOUNS))})(?P<plural>(?:e?s)?)\b)
    |(?P<image>\b(?:the|this)\s+(?:image|picture|scene)\s+(?:shows|contains|has)\b)
    |(?P<adjective>\b(?:{_any(ATTRIBUTES)})\b)
    |(?P<pronoun>\bit\b)
    |(?P<uncommitted>\b(?:{_any(_UNCOMMITTED)})\b)
    |(?P<token>\w+(?:['’]\w+)?)
    |(?P<mark>[^\w\s])
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ADJECTIVE = re.compile(rf"\b(?:{_any(ATTRIBUTES)})\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\n]*\w[^.!?\n]*[.!?]*")


@dataclass(frozen=True, eq=False)
class NounPhrase:
    """`kind` is None for a generic noun ("object"); `count` is 2 for a bare plural; adjectives carry their spans."""

    start: int
    stop: int
    determiner: str | None
    adjectives: tuple[tuple[str, int, int], ...]
    noun_span: tuple[int, int]
    kind: str | None
    plural: bool

    @property
    def definite(self) -> bool:
        return self.determiner == "the"

    @property
    def numeral(self) -> int | None:
        """The number it states in words or digits; "one" counts as an article."""
        if self.determiner in NUMBERS:
            value = NUMBERS.index(self.determiner)
        elif self.determiner is not None and self.determiner.isdigit():
            value = int(self.determiner)
        else:
            return None
        return None if value == 1 and not self.plural else value

    @property
    def well_formed(self) -> bool:
        """Article and number agree with what follows them."""
        if self.plural:
            return self.determiner in (None, "the") or (self.numeral or 0) >= 2
        first = self.adjectives[0][0] if self.adjectives else self.kind or "object"
        if self.determiner in ("a", "an"):
            return (self.determiner == "an") == (first[0] in "aeiou") or (self.kind is None and not self.adjectives)
        return self.determiner in ("the", "another", "one")


@dataclass(frozen=True, eq=False)
class Event:
    """One piece of a sentence: `name` is the alternative of the pattern that matched, with absolute positions."""

    name: str
    match: re.Match

    @property
    def span(self) -> tuple[int, int]:
        return self.match.span()

    @cached_property
    def text(self) -> str:
        return re.sub(r"\s+", " ", self.match[0].lower())

    def group(self, name: str) -> str:
        return re.sub(r"\s+", " ", self.match[name].lower())

    @cached_property
    def noun_phrase(self) -> NounPhrase:
        match = self.match
        noun = match["noun"].lower()
        determiner = match["determiner"]
        return NounPhrase(
            start=match.start(),
            stop=match.end(),
            determiner=determiner.lower() if determiner else None,
            adjectives=tuple(
                (found[0].lower(), *found.span())
                for found in _ADJECTIVE.finditer(match.string, *match.span("adjectives"))
            ),
            noun_span=(match.start("noun"), match.end("plural")),
            kind=noun if noun in KINDS else None,
            plural=bool(match["plural"]),
        )


@dataclass(frozen=True, eq=False)
class Sentence:
    """Events in reading order; `caption[start:stop]` is the sentence with its closing mark."""

    text: str
    start: int
    stop: int
    events: tuple[Event, ...]

    @property
    def closed(self) -> bool:
        """Ends in one mark; an ellipsis or a row of marks leaves it open."""
        return bool(re.search(r"[^.!?\s]\s*[.!?]$", self.text))

    @cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(re.findall(r"\w+", self.text.lower()))

    @property
    def committed(self) -> bool:
        return all(event.name != "uncommitted" for event in self.events)

    @property
    def denying(self) -> bool:
        return any(event.name == "uncommitted" and event.text in _DENYING for event in self.events)


def read(caption: str) -> list[Sentence]:
    """Every word of `caption` falls into exactly one event of one sentence."""
    sentences = []
    for found in _SENTENCE.finditer(caption):
        text = found[0].strip()
        start = found.start() + found[0].index(text)
        stop = start + len(text)
        events = tuple(Event(match.lastgroup, match) for match in _EVENT.finditer(caption, start, stop))
        sentences.append(Sentence(text, start, stop, events))
    return sentences
