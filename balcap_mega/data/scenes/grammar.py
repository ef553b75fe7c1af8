"""How a scene is told: the reference caption, and the atomic facts (units) that it states."""

from balcap_mega.data.scenes.world import Fact, Scene, SceneObject

PROMPT = "Describe the image in detail."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def reference_caption(scene: Scene) -> str:
    """Overview, each object in reading order, then how the first and the last object stand to each other.

    A place comes before what is there: a small policy that has named a place knows where to look.
    """
    relation = _main_relation(scene).attribute
    first, last = scene.objects[0], scene.objects[-1]
    return " ".join(
        [
            f"The image shows {NUMBERS[len(scene.objects)]} objects on a {scene.background} background.",
            *(f"At the {item.place} is {noun_phrase(item)}." for item in scene.objects),
            f"The {first.colour} {first.kind} is {relation} the {last.colour} {last.kind}.",
        ]
    )


def reference_units(scene: Scene) -> tuple[Fact, ...]:
    """The facts `reference_caption` states, in its order: the denominator of recall."""
    units = [Fact(None, "count", len(scene.objects)), Fact(None, "background", scene.background)]
    for index, item in enumerate(scene.objects):
        told = ("size", "texture", "colour", "kind", "word", "place")
        units += [Fact(index, name, value) for name in told if (value := getattr(item, name)) not in ("plain", None)]
    return (*units, Fact(*_main_relation(scene)))


def unit_text(scene: Scene, fact: Fact) -> str:
    """A unit as a short sentence, for people and for judges that read."""
    if fact.attribute == "count":
        return f"there are {NUMBERS[int(fact.value)]} objects"
    if fact.attribute == "background":
        return f"the background is {fact.value}"
    assert fact.subject is not None, "what else is said of a scene as a whole?"
    item = scene.objects[fact.subject]
    name = f"the {item.colour} {item.kind}"
    match fact.attribute:
        case "kind":
            return f"there is {article(item.kind)} {item.kind} at the {item.place}"
        case "colour":
            return f"the {item.kind} at the {item.place} is {item.colour}"
        case "place":
            return f"{name} is at the {item.place}"
        case "word":
            return f"{name} reads {item.word}"
        case "size" | "texture":
            return f"{name} is {fact.value}"
        case relation:
            other = scene.objects[int(fact.value)]
            return f"{name} is {relation} the {other.colour} {other.kind}"


def noun_phrase(item: SceneObject, adjectives: tuple[str, ...] | None = None) -> str:
    """ "A large striped red circle"; `adjectives` replaces the object's own."""
    if adjectives is None:
        adjectives = tuple(word for word in (item.size, item.texture, item.colour) if word != "plain")
    words = [*adjectives, item.kind]
    reads = f" that reads {item.word}" if item.word else ""
    return f"{article(words[0])} {' '.join(words)}{reads}"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _main_relation(scene: Scene) -> Fact:
    last = len(scene.objects) - 1
    same_row = scene.objects[0].row == scene.objects[last].row
    return Fact(0, "left of" if same_row else "above", last)
