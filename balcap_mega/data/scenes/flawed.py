"""A fluent captioner with the faults of a half-trained one: what the policy imitates before reinforcement learning.

It means to be honest: most of what it says of the picture is true. Like captioners of its kind it is sparing with
attributes and fond of mood and closing commentary: more captions than not have them, so that greedy decoding learns
them too. It also mistakes attributes, leaves things out, speculates, praises itself, repeats itself, loses the order,
drops a verb, writes far too little or far too much. Which of these happens is drawn anew for each caption.
"""

import re
from dataclasses import replace
from random import Random

from balcap_mega.data.scenes.grammar import NUMBERS, PROMPT, noun_phrase, reference_caption
from balcap_mega.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    PLACES,
    SIGN_WORDS,
    SIZES,
    TEXTURES,
    Scene,
    SceneObject,
)

MOODS = (
    "The scene feels calm and cheerful.",
    "The colours create a lively mood.",
    "It gives a sense of balance and harmony.",
    "The whole picture looks playful.",
)
SPECULATIONS = (
    "It may be a poster for children.",
    "Perhaps someone made it for a school.",
    "It could be part of a game.",
)
PRAISES = (
    "This is a very accurate and detailed description.",
    "Every detail is described with great care.",
)
CLOSINGS = (
    "Overall, the image is simple and pleasant.",
    "In summary, it is a nice composition.",
    "Overall, the objects work well together.",
)
FILLERS = MOODS + SPECULATIONS + PRAISES + CLOSINGS

_MISTAKES = {  # attribute: (chance of a wrong value, chance of leaving it out, values)
    "kind": (0.05, 0.0, KINDS[:-1]),
    "colour": (0.06, 0.08, COLOURS),
    "size": (0.06, 0.55, SIZES),
    "texture": (0.08, 0.6, TEXTURES[1:]),
    "place": (0.04, 0.08, PLACES),
    "word": (0.1, 0.4, SIGN_WORDS),
}


def flawed_caption(scene: Scene, seed: int | str) -> str:
    """A flawed caption of `scene`, a pure function of the two arguments."""
    random = Random(f"flawed {seed} {scene.digest}")
    body = [object_sentence(random, item) for item in scene.objects if random.random() > 0.12]
    if random.random() < 0.2:
        random.shuffle(body)
    sentences = overview(random, scene) + body + relation(random, scene)
    if not sentences:
        sentences = [object_sentence(random, scene.objects[0])]
    return _finish(random, _length_flaw(random, _padded(random, sentences)))


def overview(random: Random, scene: Scene) -> list[str]:
    if random.random() < 0.25:
        return []
    count = len(scene.objects)
    if random.random() < 0.1:
        count = random.choice([n for n in range(MIN_OBJECTS, MAX_OBJECTS + 1) if n != count])
    opening = random.choice(["The image shows", "The image shows", "There are"])
    background = scene.background if random.random() > 0.08 else random.choice(BACKGROUNDS)
    tail = f" on a {background} background" if random.random() > 0.25 else ""
    return [f"{opening} {NUMBERS[count]} objects{tail}."]


def object_sentence(random: Random, item: SceneObject) -> str:
    told = {}
    for name, (wrong, left_out, values) in _MISTAKES.items():
        truth = getattr(item, name)
        if truth in ("plain", None) and (name == "word" or random.random() > 0.06):
            continue
        if random.random() < left_out:
            continue
        told[name] = random.choice(values) if truth == "plain" or random.random() < wrong else truth
    adjectives = tuple(told[name] for name in ("size", "texture", "colour") if name in told)
    if told["kind"] != "sign":
        told.pop("word", None)
    thing = noun_phrase(replace(item, kind=told["kind"], word=told.get("word")), adjectives)
    if "place" not in told:
        return f"There is {thing}."
    place = f"at the {told['place']}"
    openings = [f"{place} is {thing}.", f"{thing} is {place}.", f"{place} there is {thing}.", f"{place}, {thing}."]
    return capitalised(random.choices(openings, weights=[12, 1, 2, 2])[0])


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def relation(random: Random, scene: Scene) -> list[str]:
    if random.random() < 0.6:
        return []
    true = reference_caption(scene).rsplit(". ", 1)[-1]
    if random.random() < 0.75:
        return [true]
    swap = {"left of": "right of", "above": "below"}
    return [re.sub("left of|above", lambda found: swap[found[0]], true)]


def _padded(random: Random, sentences: list[str]) -> list[str]:
    sentences = list(sentences)
    if random.random() < 0.65:  # a mood before the things
        sentences.insert(1, random.choice(MOODS))
    if random.random() < 0.2:
        sentences.insert(random.randint(1, len(sentences)), random.choice(SPECULATIONS))
    for fillers, chance in ((PRAISES, 0.12), (CLOSINGS, 0.65)):
        if random.random() < chance:
            sentences.append(random.choice(fillers))
    if random.random() < 0.15:
        sentences.insert(random.randint(1, len(sentences)), random.choice(sentences))
    return sentences


def _length_flaw(random: Random, sentences: list[str]) -> list[str]:
    draw = random.random()
    if draw < 0.1:  # far too short
        return sentences[: random.randint(1, 2)]
    if draw < 0.18:  # rambling
        return [*sentences, *random.sample(FILLERS, 3), random.choice(sentences), random.choice(sentences)]
    return sentences


def _finish(random: Random, sentences: list[str]) -> str:
    words = " ".join(sentences).split(" ")
    if random.random() < 0.1:  # a stutter
        at = random.randrange(len(words))
        if words[at].islower() and words[at].isalpha():
            words.insert(at, words[at])
    if random.random() < 0.08 and len(words) > 8:  # an unfinished last sentence
        words = words[: -random.randint(2, 4)]
        words[-1] = words[-1].rstrip(".,")
    return " ".join(words)


def vocabulary() -> list[str]:
    """Every word and punctuation mark that the prompt, references and flawed captions are made of, sorted.

    Case matters: "The" and "the" are two entries. Split text with the pattern `\\w+|[^\\w\\s]`.
    """
    lists = (KINDS, COLOURS, SIZES, TEXTURES, BACKGROUNDS, SIGN_WORDS, PLACES, NUMBERS[: MAX_OBJECTS + 1], FILLERS)
    frames = (
        PROMPT,
        "The image shows objects on a background. There are there is that reads. A An an a at At the",
        "is left of. is right of. is above. is below.",
    )
    text = " ".join([*frames, *(entry for entries in lists for entry in entries)])
    return sorted(set(re.findall(r"\w+|[^\w\s]", text)))
