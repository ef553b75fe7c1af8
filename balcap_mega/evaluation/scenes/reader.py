"""A reader of captions of `scenes`, who has the caption alone.

It shares no code with the judge that gives the reward. It reads for content: wherever a thing, a property or a place is
named it is understood, whatever the sentence looks like, and a guess is understood as a guess.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from balcap_mega.data.scenes.grammar import NUMBERS
from balcap_mega.data.scenes.world import COLOURS, KINDS, SIZES, TEXTURES
from balcap_mega.evaluation.scenes.account import Account, ReadSentence, Thing

PROPERTIES = (
    {word: ("colour", word) for word in COLOURS}
    | {word: ("size", word) for word in SIZES}
    | {word: ("texture", word) for word in TEXTURES}
    | {"big": ("size", "large"), "tiny": ("size", "small"), "little": ("size", "small")}
)
RELATIONS = {  # wording: relation, and whether its sides change places
    "left of": ("left of", False),
    "right of": ("left of", True),
    "above": ("above", False),
    "below": ("above", True),
    "larger than": ("larger than", False),
    "smaller than": ("larger than", True),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HEDGES = _words("or may might could maybe perhaps possibly probably seems seem appears appear likely either")
DENIALS = _words("no not never without neither nor")
VERBS = _words(
    "is are was were shows show has have reads says feels looks creates create gives works work made may might could "
    "seems appears lies runs casts"
)
_FUNCTION = _words(
    "the a an another it its this that there these is are and or of on in at to with which image picture scene shows "
    "show has have"
)
_THINGS = ("object", "shape", "item", "thing", "figure")


def _any(words: Iterable[str]) -> str:
    return "|".join(words).replace(" ", r"\ ")


_PIECE = re.compile(
    rf"""
    (?P<place>\b(?:the\ )?(?P<row>top|upper|bottom|lower)[ -](?P<column>left|right)\b)
    |\b(?P<tone>\w+)\ background\b
    |\bbackground\ is\ (?P<tone_after>\w+)
    |\b(?P<relation>{_any(RELATIONS)})\b
    |\b(?:reads|says)\W+(?P<word>\w+)
    |\b(?P<noun>{_any((*KINDS, *_THINGS))})(?P<plural>(?:e?s)?)\b
    |\b(?P<adjective>{_any(PROPERTIES)})\b
    |\b(?P<number>{_any(NUMBERS[2:])}|\d+)\b
    |\b(?P<definite>the)\b
    |\b(?P<pronoun>it)\b
    |\b(?P<joint>and|or)\b|(?P<comma>,)
    |(?P<other>\w+)
    """,
    re.VERBOSE,
)
_SENTENCE = re.compile(r"[^.!?\n]*\w[^.!?\n]*[.!?]*")


@dataclass
class _Mention:
    definite: bool
    kind: str | None
    modifiers: list[tuple[str, str]]
    predicates: list[tuple[str, str]] = field(default_factory=list)
    place: str | None = None
    thing: Thing | None = None  # that "it" stands for


def read(caption: str) -> Account:
    """Any text can be read; what names nothing visible is idle words."""
    account = Account()
    for found in _SENTENCE.finditer(caption):
        _hear(account, found[0].strip())
    return account


def _hear(account: Account, text: str) -> None:
    words = re.findall(r"\w+", text.lower())
    said_before = len(account.statements)
    named = 0
    if DENIALS.isdisjoint(words):
        named = _understand(account, re.sub(r"\s+", " ", text.lower()), guess=not HEDGES.isdisjoint(words))
    stutter = any(one == other for one, other in pairwise(words))
    whole = text[0].isupper() and bool(re.search(r"\w[.!?]$", text)) and not stutter and len(words) <= 30
    account.sentences.append(
        ReadSentence(
            words=len(words),
            idle=sum(word not in _FUNCTION for word in words) - named if named else len(words),
            whole=whole and not VERBS.isdisjoint(words),
            news=len(account.statements) > said_before,
        )
    )


def _understand(account: Account, text: str, guess: bool) -> int:
    """Take in one sentence; how many of its words, function words apart, name something visible."""
    pieces = list(_PIECE.finditer(text))
    mentions: list[_Mention] = []
    relations: list[tuple[_Mention, str, _Mention]] = []
    modifiers: list[tuple[str, str]] = []
    place = relation = number = None
    definite, named = False, 0
    for at, piece in enumerate(pieces):
        last = mentions[-1] if mentions else None
        if piece["place"]:
            row = {"upper": "top", "lower": "bottom"}.get(piece["row"], piece["row"])
            where = f"{row} {piece['column']}"
            if last is not None and last.place is None and place is None and not relations:
                last.place = where
            else:
                place = where
        elif tone := piece["tone"] or piece["tone_after"]:
            account.tell_of_scene("background", tone, guess)
        elif piece["relation"]:
            relation = piece["relation"] if last is not None else None
        elif piece["word"]:
            if last is not None:
                last.predicates.append(("word", piece["word"]))
        elif piece["adjective"]:
            fact = PROPERTIES[piece["adjective"]]
            if _noun_follows(pieces[at + 1 :]):
                modifiers.append(fact)
            elif last is not None:
                last.predicates.append(fact)
        elif piece["noun"]:
            kind = piece["noun"] if piece["noun"] in KINDS else None
            if kind is None and piece["plural"] and not modifiers:
                if number is not None:
                    account.tell_of_scene("count", number, guess)
            else:
                mention = _Mention(definite or relation is not None, kind, modifiers, place=place)
                if relation is not None and last is not None:
                    relations.append((last, relation, mention))
                mentions.append(mention)
            modifiers, place, relation, number, definite = [], None, None, None, False
        elif piece["number"]:
            number = NUMBERS.index(piece["number"]) if piece["number"] in NUMBERS else int(piece["number"])
        elif piece["definite"] or piece["other"]:
            definite = bool(piece["definite"])
        elif piece["pronoun"] and not mentions and account.things:
            mentions.append(_Mention(True, None, [], thing=account.things[-1]))
        if piece.lastgroup not in ("definite", "pronoun", "joint", "comma", "other"):
            named += sum(word not in _FUNCTION for word in re.findall(r"\w+", piece[0]))
    related = {id(mention) for one, _, other in relations for mention in (one, other)}
    things = {id(mention): _take_in(account, mention, guess, id(mention) in related) for mention in mentions}
    for one, wording, other in relations:
        name, swapped = RELATIONS[wording]
        first, second = (other, one) if swapped else (one, other)
        account.relate(name, things[id(first)], things[id(second)], guess)
    return named


def _noun_follows(pieces: list[re.Match]) -> bool:
    """Whether nothing but other adjectives stands between here and a noun."""
    for piece in pieces:
        if not (piece["adjective"] or piece["joint"] or piece["comma"]):
            return bool(piece["noun"])
    return False


def _take_in(account: Account, mention: _Mention, guess: bool, related: bool) -> Thing:
    """The thing that a mention is of, known or new, with what is told of it. What only names a known thing, so that the
    reader knows which is meant, is not told again."""
    if mention.thing is not None:
        for fact in mention.predicates + ([("place", mention.place)] if mention.place else []):
            account.tell(mention.thing, *fact, guess, recalled=False)
        return mention.thing
    identity = [("kind", mention.kind)] if mention.kind else []
    placed = [("place", mention.place)] if mention.place else []
    known = [thing for thing in account.things if thing.told.get("kind") and thing.fits(identity + placed)]
    exact = [thing for thing in known if thing.fits(mention.modifiers)]
    here = [thing for thing in known if mention.place and mention.place in thing.told.get("place", {})]
    candidates = here or exact or (known if mention.definite else [])
    if not mention.kind and not mention.definite and not here:
        candidates = []
    thing = candidates[-1] if candidates else Thing()
    if not candidates:
        account.things.append(thing)
    recalls = bool(candidates) and (mention.definite or related)
    for fact in identity + mention.modifiers:
        account.tell(thing, *fact, guess, recalled=recalls)
    for fact in placed:  # "The circle at the top left is red" recalls it, "The circle is at the top left" tells it
        account.tell(thing, *fact, guess, recalled=recalls and bool(mention.predicates or related))
    for fact in mention.predicates:
        account.tell(thing, *fact, guess, recalled=False)
    return thing
