"""Answers questions about a scene from what a caption claims, and from nothing else: the scene itself is not there."""

from balcap_mega.data.scenes.grammar import NUMBERS
from balcap_mega.data.scenes.questions import CONVERSE, Named, SceneQuestion
from balcap_mega.data.scenes.world import PLACES
from balcap_mega.rewards.scenes.discourse import Discourse, Entity
from balcap_mega.rewards.scenes.verify import contested


def answer(question: SceneQuestion, discourse: Discourse) -> str | None:
    """The choice that the caption's claims lead to; None where they lead to none, or to several.

    A thing that the question names must be one of which the caption says so, and the only one. What is said twice, and
    differently, or of things that cannot both be there, is no answer. That a kind is not there follows only from a
    caption that tells how many objects there are and names the kind of each.
    """
    match question.attribute:
        case "count" | "background":
            found = _only(discourse.scene, question.attribute)
            found = NUMBERS[found] if isinstance(found, int) and found < len(NUMBERS) else found
        case "presence":
            found = _presence(discourse, dict(question.about)["kind"])
        case "left of" | "above":
            found = _relation(discourse, question)
        case attribute:
            thing = _thing(discourse, question.about)
            found = None if thing is None else _only(thing, attribute)
    return found if found in question.choices else None


def _only(thing: Entity, attribute: str) -> str | int | None:
    """What is said of it, if that is one thing."""
    values = thing.stated.get(attribute, [])
    return values[0] if len(values) == 1 else None


def _thing(discourse: Discourse, named: Named) -> Entity | None:
    told = [
        thing for thing in discourse.entities if all(_only(thing, attribute) == value for attribute, value in named)
    ]
    return told[0] if len(told) == 1 and told[0] not in contested(discourse) else None


def _presence(discourse: Discourse, kind: str) -> str | None:
    kinds = [_only(thing, "kind") for thing in discourse.entities]
    if kind in kinds:
        return "yes"
    whole = None not in kinds and len(kinds) == _only(discourse.scene, "count")
    return "no" if whole else None


def _relation(discourse: Discourse, question: SceneQuestion) -> str | None:
    """By what is said of the two together, and by the places that they are said to be in."""
    one, other = _thing(discourse, question.about), _thing(discourse, question.other)
    if one is None or other is None or one is other:
        return None
    said = set()
    for claim in discourse.claims:
        if claim.attribute == question.attribute:
            if one in claim.entities and claim.value is other:
                said.add(question.attribute)
            if other in claim.entities and claim.value is one:
                said.add(CONVERSE[question.attribute])
    where = [_only(thing, "place") for thing in (one, other)]
    if None not in where:
        axis = 1 if question.attribute == "left of" else 2
        first, second = (PLACES.index(place) // axis % 2 for place in where)
        if first != second:
            said.add(question.attribute if first < second else CONVERSE[question.attribute])
    return said.pop() if len(said) == 1 else None
