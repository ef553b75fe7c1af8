"""Holds a caption's claims against the scene: which are true, and which reference units they cover."""

from balcap_mega.data.scenes.world import MAX_OBJECTS, RELATIONS, Fact, Scene
from balcap_mega.rewards.judge import Assertion, Verdict
from balcap_mega.rewards.scenes.discourse import Claim, Discourse, Entity

_WEIGHTS = {"place": 3, "kind": 2, "colour": 2, "word": 1, "size": 1, "texture": 1}
_IMPLIED_BY = {"left of": "place", "above": "place", "larger than": "size"}

Binding = dict[Entity, int | None]


def bind(discourse: Discourse, scene: Scene, shared: bool = False) -> Binding:
    """Which object of the scene each entity can stand for: the best match, one to one; None where there is none.

    An entity and an object match when their place or kind agrees (for "an object", its colour); among matches the one
    with most true claims wins, then the entity spoken of first. `shared`: each has its best, several the same perhaps.
    """
    matches = []
    for order, entity in enumerate(discourse.entities):
        for index in range(len(scene.objects)):
            true = {
                name for name in _WEIGHTS if any(scene.holds(Fact(index, name, v)) for v in entity.stated.get(name, ()))
            }
            anchor = {"place", "kind"} if "kind" in entity.stated else {"place", "colour"}
            if true & anchor:
                matches.append((-sum(_WEIGHTS[name] for name in true), order, index))
    binding: Binding = dict.fromkeys(discourse.entities)
    for _, order, index in sorted(matches):
        entity = discourse.entities[order]
        if binding[entity] is None and (shared or index not in binding.values()):
            binding[entity] = index
    return binding


def verify(
    caption: str, discourse: Discourse, binding: Binding, scene: Scene, pointability: bool = True, lenient: bool = False
) -> tuple[tuple[Assertion, ...], set[Fact], int]:
    """Assertions with their verdicts, the facts covered, and how many true relations told nothing new.

    After the first, a true relation that follows from the places (or sizes) stated anyway is no further assertion:
    else any caption could be diluted with them. Claims that the caption contradicts cover nothing, unless `lenient`.
    """
    assertions, covered, implied = [], set(), 0
    doubtful = contested(discourse)
    related = False
    for claim in discourse.claims:
        facts = _facts(claim, discourse, binding)
        true = facts is not None and all(scene.holds(fact) for fact in facts)
        if true and claim.attribute in RELATIONS:
            told = [each for each in (*claim.entities, claim.value) if isinstance(each, Entity)]
            if related and all(_IMPLIED_BY[claim.attribute] in entity.stated for entity in told):
                implied += 1
                continue
            related = True
        verdict = Verdict.VERIFIED if true else Verdict.WRONG
        if claim.attribute is None:  # nothing visible is claimed, so nothing there can be wrong
            verdict = Verdict.NOT_POINTABLE if pointability else Verdict.VERIFIED
        assertions.append(Assertion(caption[claim.start : claim.stop], claim.start, claim.stop, verdict))
        if true and (lenient or not any(e in doubtful or claim.attribute in e.contradictory for e in claim.entities)):
            covered.update(facts)
    return tuple(assertions), covered, implied


def _facts(claim: Claim, discourse: Discourse, binding: Binding) -> list[Fact] | None:
    """The claim about the scene's own objects; None where it speaks of something that is not there."""
    if claim.attribute is None:
        return None
    if claim.entities == (discourse.scene,):
        return [Fact(None, claim.attribute, claim.value)]
    value = binding[claim.value] if isinstance(claim.value, Entity) else claim.value
    subjects = [binding[entity] for entity in claim.entities]
    if value is None or None in subjects:
        return None
    return [Fact(subject, claim.attribute, value) for subject in subjects]


def contested(discourse: Discourse) -> set[Entity]:
    """Entities that cannot all be there, so that none of them tells a reader anything: those that share a place, and,
    when the caption names more objects than a scene has places, those without one."""
    holders: dict[str, list[Entity]] = {}
    for entity in discourse.entities:
        for place in entity.stated.get("place", ()):
            holders.setdefault(place, []).append(entity)
    doubtful = {entity for group in holders.values() if len(group) > 1 for entity in group}
    if len(discourse.entities) > MAX_OBJECTS:
        doubtful |= {entity for entity in discourse.entities if "place" not in entity.stated}
    return doubtful


def contradictions(discourse: Discourse) -> int:
    """Places, attributes and overviews about which the caption disagrees with itself."""
    own = sum(len(thing.contradictory) for thing in (discourse.scene, *discourse.entities))
    return own + len(contested(discourse)) // 2
