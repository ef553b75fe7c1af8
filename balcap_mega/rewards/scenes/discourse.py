"""Follows a caption from sentence to sentence: which things it speaks of, and every claim that it makes about them."""

from dataclasses import dataclass, field

from balcap_mega.data.scenes.world import MAX_OBJECTS
from balcap_mega.rewards.scenes.reading import ATTRIBUTES, RELATIONS, Event, NounPhrase, Sentence, words_of

_FUNCTION_WORDS = words_of(
    "a an the is are of and there it this that which with in on at to has have also both while image picture "
    "scene shows show contains contain one"
)
_CLAIMING = ("place", "background", "ground", "relation", "reads", "noun_phrase", "adjective")


@dataclass(eq=False)
class Entity:
    """One thing the caption speaks of. `stated` collects what it says of it: attribute -> values, in order."""

    stated: dict[str, list[str | int]] = field(default_factory=dict)
    listed: bool = False  # met only as a member of a plural ("two circles") so far

    def first(self, attribute: str) -> str | int | None:
        return self.stated.get(attribute, [None])[0]

    def state(self, attribute: str, value: str | int) -> None:
        values = self.stated.setdefault(attribute, [])
        if value not in values:
            values.append(value)

    def allows(self, attribute: str, value: str | int) -> bool:
        return self.first(attribute) in (None, value)

    @property
    def contradictory(self) -> frozenset[str]:
        return frozenset(attribute for attribute, values in self.stated.items() if len(values) > 1)


@dataclass(frozen=True, eq=False)
class Claim:
    """`caption[start:stop]` says that each of `entities` has `attribute` = `value`, or stands so to `value`.

    `attribute` is None where the text points at nothing visible. A `recalled` claim only helps to name something
    already spoken of ("the red circle is ..."): saying it again is no repetition.
    """

    start: int
    stop: int
    attribute: str | None = None
    value: str | int | Entity | None = None
    entities: tuple[Entity, ...] = ()
    recalled: bool = False


@dataclass
class Discourse:
    """What a caption says as a whole.

    claims:      fresh ones only, in reading order: a claim made before is counted in `redundant` instead
    scene:       stands for the picture itself (attributes count and background)
    unanchored:  definite phrases ("the star") for things not introduced;  ambiguous: that fit several things
    informative: per sentence, the words that take part in saying something visible, for the first time
    late_overview: the number of objects or the background comes after the first object
    """

    claims: list[Claim] = field(default_factory=list)
    entities: list[Entity] = field(default_factory=list)
    scene: Entity = field(default_factory=Entity)
    redundant: int = 0
    repeated_sentences: int = 0
    unanchored: int = 0
    ambiguous: int = 0
    informative: list[int] = field(default_factory=list)
    late_overview: bool = False


def follow(sentences: list[Sentence], lenient: bool = False) -> Discourse:
    """lenient: hear a guess or an alternative as if it were said plainly"""
    discourse = Discourse()
    heard = set()
    for sentence in sentences:
        if sentence.words in heard:
            discourse.repeated_sentences += 1
            discourse.informative.append(0)
            continue
        heard.add(sentence.words)
        if sentence.committed or (lenient and not sentence.denying):
            claims, idle = _Listener(discourse).hear(sentence)
        else:
            claims = [Claim(*span) for event in sentence.events for span in _spans(event)]
            idle = len(sentence.words)
        pointable = any(claim.attribute for claim in claims)
        discourse.informative.append(len(sentence.words) - idle if pointable else 0)
        discourse.claims += claims or [Claim(sentence.start, sentence.stop)]
    _merge(discourse)
    return discourse


def _spans(event: Event) -> list[tuple[int, int]]:
    """The separate assertions that an event would make, were it stated plainly."""
    if event.name == "noun_phrase":
        phrase = event.noun_phrase
        return [(start, stop) for _, start, stop in phrase.adjectives] + [phrase.noun_span]
    return [event.span] if event.name in _CLAIMING else []


class _Listener:
    """Understands one sentence in the light of those before it."""

    def __init__(self, discourse: Discourse):
        self.discourse = discourse
        self.claims: list[Claim] = []
        self.subject: tuple[Entity, ...] = ()
        self.place: tuple[str, Event] | None = None  # "At the top left is ...": waits for its noun phrase
        self.relation: Event | None = None  # waits for its second noun phrase
        self.idle: list[Event] = []  # a run of words that say nothing visible
        self.idle_words = 0
        self.guessing = False  # "may be", heard leniently: its verb

    def hear(self, sentence: Sentence) -> tuple[list[Claim], int]:
        """The sentence's claims, and how many of its words take no part in any visible one."""
        self.guessing = not sentence.committed
        for event, following in zip(sentence.events, (*sentence.events[1:], None)):
            if event.name == "mark" or event.name in _CLAIMING:
                self._end_idle()
            new_clause = event.text in (",", ";", "and", "while")
            if new_clause and following is not None and following.name == "place":
                self.subject = ()
            handler = getattr(self, f"_on_{event.name}", None)
            if handler:
                handler(event)
        self._end_idle()
        for event in filter(None, (self.relation, self.place and self.place[1])):
            self.claims.append(Claim(*event.span))  # nothing it could be said of
        return self.claims, self.idle_words

    def _on_token(self, event: Event) -> None:
        if event.text not in _FUNCTION_WORDS and not (self.guessing and event.text == "be"):
            self.idle.append(event)

    def _end_idle(self) -> None:
        if self.idle:
            self.claims.append(Claim(self.idle[0].span[0], self.idle[-1].span[1]))
            self.idle_words += len(self.idle)
            self.idle = []

    def _on_pronoun(self, event: Event) -> None:
        if not self.subject and self.discourse.entities:
            self.subject = (self.discourse.entities[-1],)

    def _on_background(self, event: Event) -> None:
        self._claim((self.discourse.scene,), "background", event.group("tone"), event.span)

    def _on_ground(self, event: Event) -> None:
        self._claim((self.discourse.scene,), "background", event.group("ground_tone"), event.span)

    def _on_place(self, event: Event) -> None:
        row = {"upper": "top", "lower": "bottom"}.get(event.group("row"), event.group("row"))
        place = f"{row} {event.group('column')}"
        if self.subject:
            self._claim(self.subject, "place", place, event.span)
        else:
            if self.place:
                self.claims.append(Claim(*self.place[1].span))
            self.place = (place, event)

    def _on_adjective(self, event: Event) -> None:
        self._claim(self.subject, *ATTRIBUTES[event.text], event.span)

    def _on_reads(self, event: Event) -> None:
        self._claim(self.subject, "word", event.group("word"), event.span)

    def _on_relation(self, event: Event) -> None:
        if self.relation or not self.subject:
            self.claims.append(Claim(*event.span))
        else:
            self.relation = event

    def _on_noun_phrase(self, event: Event) -> None:
        phrase = event.noun_phrase
        if phrase.kind is None and phrase.plural and not phrase.adjectives:
            if phrase.numeral is not None:
                self._claim((self.discourse.scene,), "count", phrase.numeral, event.span)
            return
        if phrase.numeral == 0:
            self.claims.append(Claim(*event.span))
            return
        entities, known = self._things(phrase)
        for word, start, stop in phrase.adjectives:
            self._claim(entities, *ATTRIBUTES[word], (start, stop), recalled=known)
        if phrase.kind:
            self._claim(entities, "kind", phrase.kind, phrase.noun_span, recalled=known)
        if self.relation:
            self._relate(self.subject, self.relation, entities)
        else:
            self.subject = entities
            if self.place:
                place, said = self.place
                self._claim(entities, "place", place, said.span)
                self.place = None

    def _relate(self, subject: tuple[Entity, ...], event: Event, others: tuple[Entity, ...]) -> None:
        name, swapped = RELATIONS[event.group("wording")]
        if swapped:
            subject, others = others, subject
        self.claims.append(Claim(*event.span, name, others[0], subject))
        self.relation = None

    def _things(self, phrase: NounPhrase) -> tuple[tuple[Entity, ...], bool]:
        """The entities a noun phrase stands for, and whether they were spoken of before."""
        entities = self.discourse.entities
        told = [("kind", phrase.kind)] if phrase.kind else []
        told += [ATTRIBUTES[word] for word, *_ in phrase.adjectives]
        fitting = [thing for thing in entities if all(thing.allows(*fact) for fact in told)]
        if phrase.definite and fitting:
            if phrase.plural:
                return tuple(fitting), True
            fits = [sum(thing.first(name) == value for name, value in told) for thing in fitting]
            best = [thing for thing, fit in zip(fitting, fits) if fit == max(fits)]
            self.discourse.ambiguous += len(best) > 1
            return (best[-1],), True
        if phrase.definite:
            self.discourse.unanchored += 1
        listed = [thing for thing in fitting if thing.listed and thing.first("kind") == phrase.kind]
        if listed and not phrase.plural:  # "There are two circles. A red circle is ...": one of the two
            listed[0].listed = False
            return (listed[0],), True
        count = phrase.numeral or (2 if phrase.plural else 1)
        new = tuple(Entity(listed=phrase.plural) for _ in range(min(count, MAX_OBJECTS + 1)))
        entities += new
        return new, False

    def _claim(self, entities, attribute: str, value: str | int, span: tuple[int, int], recalled: bool = False) -> None:
        if not entities:
            self.claims.append(Claim(*span))
            return
        if self.discourse.scene in entities:
            self.discourse.late_overview |= bool(self.discourse.entities)
        for entity in entities:
            entity.state(attribute, value)
        self.claims.append(Claim(*span, attribute, value, tuple(entities), recalled))


def _merge(discourse: Discourse) -> None:
    """Take two things of one kind in one place for the same thing, then keep only the first of equal claims."""
    same: dict[Entity, Entity] = {}
    first_there: dict[tuple, Entity] = {}
    for entity in discourse.entities:
        kind, place = entity.first("kind"), entity.first("place")
        original = first_there.setdefault((kind, place), entity) if kind and place else entity
        same[entity] = original
        if original is not entity:
            for attribute, values in entity.stated.items():
                for value in values:
                    original.state(attribute, value)
    discourse.entities = [entity for entity in discourse.entities if same[entity] is entity]

    made, fresh = set(), []
    for claim in discourse.claims:
        entities = tuple(dict.fromkeys(same.get(entity, entity) for entity in claim.entities))
        value = same.get(claim.value, claim.value) if isinstance(claim.value, Entity) else claim.value
        key = (claim.attribute, value, entities)
        if claim.attribute is not None and key in made:
            discourse.redundant += not claim.recalled
            continue
        made.add(key)
        fresh.append(Claim(claim.start, claim.stop, claim.attribute, value, entities, claim.recalled))
    discourse.claims = fresh
