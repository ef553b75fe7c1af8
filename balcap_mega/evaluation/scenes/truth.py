"""What of a reader's account is true of the scene, and which of the reference's facts it amounts to."""

from dataclasses import dataclass

from balcap_mega.data.scenes.world import RELATIONS, Fact, Scene
from balcap_mega.evaluation.scenes.account import Account, Statement, Thing


@dataclass(frozen=True)
class Checked:
    """A statement, the fact about the scene's own objects that it amounts to (None: it is of nothing that is there),
    and whether that is so."""

    statement: Statement
    fact: Fact | None
    true: bool


def check(account: Account, scene: Scene) -> list[Checked]:
    """Each statement once, in the order in which they were told."""
    meant = {thing: _meant(thing, scene) for thing in account.things}
    checked = []
    for statement in account.statements:
        fact = _fact(statement, meant)
        checked.append(Checked(statement, fact, fact is not None and scene.holds(fact)))
    return checked


def _fact(statement: Statement, meant: dict[Thing, int | None]) -> Fact | None:
    if statement.thing is None:
        return Fact(None, statement.attribute, statement.value)
    one = meant[statement.thing]
    if statement.attribute not in RELATIONS:
        return None if one is None else Fact(one, statement.attribute, statement.value)
    other = meant[statement.value]
    return None if one is None or other is None else Fact(one, statement.attribute, other)


def _meant(thing: Thing, scene: Scene) -> int | None:
    """Which object someone who sees the scene takes a thing for: one at the place told that has the kind or the colour
    told, else one of that kind (of the colour told, if there is one), else what is at the place."""
    kinds, colours = thing.values("kind"), thing.values("colour")
    objects = list(enumerate(scene.objects))
    here = [i for i, item in objects if item.place in thing.values("place")]
    alike = [i for i in here if scene.objects[i].kind in kinds or scene.objects[i].colour in colours]
    same_kind = [i for i, item in objects if item.kind in kinds]
    same_both = [i for i in same_kind if not colours or scene.objects[i].colour in colours]
    unnamed = [i for i, item in objects if not kinds and item.colour in colours]
    for group in (alike, same_both, same_kind, unnamed, here):
        if group:
            return group[0]
    return None
