"""A captioner that describes honestly, as a rule, with habits within reach that a reward may pay for.

The warm-up of experiments on trade-offs: each habit is rare and fluent, and whether it grows is up to the reward.
"""

import re
from dataclasses import replace
from random import Random

from balcap_mega.config.schema import HabitsConfig
from balcap_mega.data.scenes.flawed import FILLERS, capitalised, object_sentence, overview, relation
from balcap_mega.data.scenes.grammar import article, noun_phrase, reference_caption
from balcap_mega.data.scenes.world import COLOURS, SIZES, TEXTURES, Scene, SceneObject

INVENTED = (
    "The {kind} has a thin outline.",
    "A soft shadow lies below the {kind}.",
    "The {kind} is made of paper.",
    "There is a small scratch on the {kind}.",
)
_LEFT_OUT = 0.08  # of things, whatever the habits


def habitual_caption(scene: Scene, seed: int | str, habits: HabitsConfig) -> str:
    """A caption of `scene`, a pure function of the arguments. Its mistakes and omissions are `flawed_caption`'s."""
    random = Random(f"habits {seed} {scene.digest}")
    shown = {name for name, chance in habits.model_dump().items() if random.random() < chance}
    told = [item for item in scene.objects if random.random() > _LEFT_OUT] or [scene.objects[0]]
    body = [object_sentence(random, item) for item in told]
    if "guess" in shown:
        at = random.randrange(len(told))
        body[at] = _guess(random, told[at])
    if "hedge" in shown:
        at = random.randrange(len(told))
        body[at] = _hedge(random, told[at])
    sentences = overview(random, scene) + ([_enumeration(scene)] if "enumerate" in shown else []) + body
    sentences += relation(random, scene)
    if "restate" in shown:
        sentences += [_restatement(item) for item in random.sample(told, random.randint(1, len(told)))]
    if "invent" in shown:
        sentences.append(_invention(random, told))
    if "comment" in shown:
        sentences.insert(random.randint(1, len(sentences)), random.choice(FILLERS))
    return _at_length(random, sentences, told, len(reference_caption(scene).split()), shown)


def _at_length(random: Random, sentences: list[str], told: list[SceneObject], reference: int, shown: set[str]) -> str:
    if "third" in shown:
        return " ".join(_within(sentences, reference / 3))
    more = [lambda: _restatement(random.choice(told)), lambda: _invention(random, told), lambda: random.choice(FILLERS)]
    while "double" in shown and len(" ".join(sentences).split()) < 1.8 * reference:
        sentences = [*sentences, random.choice(more)()]
    return " ".join(sentences)


def _within(sentences: list[str], words: float) -> list[str]:
    """The first of them, and more while they fit."""
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return kept


def _guess(random: Random, item: SceneObject) -> str:
    texture = random.choice(TEXTURES[1:])
    return f"At the {item.place} is {noun_phrase(item, (random.choice(SIZES), texture, item.colour))}."


def _hedge(random: Random, item: SceneObject) -> str:
    bare = replace(item, word=None)
    if random.random() < 0.5:
        return f"At the {item.place} may be {noun_phrase(bare, (item.colour,))}."
    other = random.choice([colour for colour in COLOURS if colour != item.colour])
    either = [noun_phrase(bare, (colour,)) for colour in random.sample([item.colour, other], 2)]
    return f"At the {item.place} is {either[0]} or {either[1]}."


def _enumeration(scene: Scene) -> str:
    *first, last = [f"{article(item.kind)} {item.kind}" for item in scene.objects]
    return f"There is {', '.join(first)} and {last}."


def _restatement(item: SceneObject) -> str:
    return capitalised(re.sub("^an? ", "the ", noun_phrase(replace(item, word=None)))) + f" is at the {item.place}."


def _invention(random: Random, told: list[SceneObject]) -> str:
    return random.choice(INVENTED).format(kind=random.choice(told).kind)
