"""Clarity, fluency and coherency of a caption as text. Whether it is true plays no part here."""

import re
from dataclasses import dataclass
from itertools import pairwise

from balcap_mega.data.scenes.world import PLACES
from balcap_mega.rewards.scenes.discourse import Discourse
from balcap_mega.rewards.scenes.reading import Event, Sentence, words_of
from balcap_mega.rewards.scenes.verify import contradictions

# Scene language over one symbol an event: N noun phrase, M plural noun phrase, P place, B background phrase,
# G background clause, R relation, W what a sign reads, A adjective, I "the image shows", T "it"; words as below.
_WORDS = {"is": "i", "are": "r", "there": "t", "that": "h", "which": "h", "and": "&", "while": "&"}
_NAMES = {"place": "P", "background": "B", "ground": "G", "relation": "R", "reads": "W", "adjective": "A"}
_NAMES |= {"image": "I", "pronoun": "T"}
_THING, _AND = "N(?:hW)?", "(?:,|,?&)"
_LIST = rf"(?:{_THING}|M)(?:{_AND}(?:{_THING}|M))*"
_CLAUSE = (
    rf"(?:I{_LIST}P?B?|t(?:i{_THING}|rM)(?:{_AND}(?:{_THING}|M))*P?B?|P,?t?(?:i{_THING}|rM)"
    rf"|(?:{_THING}|T)(?:iP|iRN|iA(?:{_AND}A)*|W)|M(?:rP|rA(?:{_AND}A)*)|G)"
)
_WELL_FORMED = re.compile(rf"{_CLAUSE}(?:(?:,?&|;){_CLAUSE})?")
_VERBS = words_of(
    "is are was were feels feel looks look creates create gives give makes make shows show has have works work "
    "adds brings seems may could might described"
)
_VIEWPOINT = words_of("i me my we us our you your")


@dataclass(frozen=True)
class Style:
    clarity: float
    fluency: float
    coherency: float


def assess(caption: str, sentences: list[Sentence], discourse: Discourse, implied: int) -> Style:
    """Each score lies in [0, 1]. `implied` counts relations that told nothing new (see `verify`).

    Clarity is the share of words that tell something visible, once, in sentences; less for ambiguous reference.
    Fluency is the share of words in well-formed sentences, half for others that at least look like one.
    Coherency: reading order, overview first, no contradiction, nothing unintroduced, repeated or off the subject.
    """
    words = [len(sentence.words) for sentence in sentences]
    total = sum(words)
    if not total or not any(discourse.informative):
        return Style(0.0, _fluency(caption, sentences), 0.0)
    forms = [_form(sentence) for sentence in sentences]
    in_sentences = sum(n for n, form in zip(words, forms) if form) / total
    informative = sum(n for n, form in zip(discourse.informative, forms) if form) / total
    fresh = sum(claim.attribute is not None for claim in discourse.claims)
    redundant = discourse.redundant + implied
    clarity = informative * fresh / (fresh + redundant) * 0.9**discourse.ambiguous

    digressions = sum(not n for n in discourse.informative) - discourse.repeated_sentences
    coherency = (
        in_sentences
        * (1 - 0.5 * _disorder(discourse))
        * (0.85 if discourse.late_overview else 1.0)
        * 0.6 ** contradictions(discourse)
        * 0.85**discourse.unanchored
        * 0.8**discourse.repeated_sentences
        * 0.9**digressions
        * (0.7 if any(word in _VIEWPOINT for sentence in sentences for word in sentence.words) else 1.0)
    )
    return Style(clarity, _fluency(caption, sentences), coherency)


def _fluency(caption: str, sentences: list[Sentence]) -> float:
    total = sum(len(sentence.words) for sentence in sentences)
    if not total:
        return 0.0
    stray = len("".join(caption.split())) / len("".join("".join(s.text for s in sentences).split()))  # marks between
    return sum(len(sentence.words) * _form(sentence) for sentence in sentences) / total / stray


def _form(sentence: Sentence) -> float:
    """1 for well-formed scene language, 0.5 for what looks like a sentence, 0 for anything else; less unpunctuated."""
    manners = (1.0 if sentence.text[0].isupper() else 0.8) * (1.0 if sentence.closed else 0.7)
    if _WELL_FORMED.fullmatch("".join(map(_symbol, sentence.events)).removesuffix(".")):
        return manners
    words = sentence.words
    stutter = any(one == other for one, other in pairwise(words))
    looks_whole = 3 <= len(words) <= 25 and not stutter and not _VERBS.isdisjoint(words)
    return 0.5 if looks_whole and manners == 1.0 else 0.0


def _symbol(event: Event) -> str:
    if event.name == "noun_phrase":
        phrase = event.noun_phrase
        return ("M" if phrase.plural else "N") if phrase.well_formed else "?"
    if event.name == "mark":
        return event.text if event.text in ",;." else "?"
    return _NAMES.get(event.name) or _WORDS.get(event.text, "?")


def _disorder(discourse: Discourse) -> float:
    """The share of object pairs that are told against the reading order."""
    order = [PLACES.index(place) for entity in discourse.entities if (place := entity.first("place"))]
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0
