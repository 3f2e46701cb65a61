"""Questions about built-in scenes, made of their facts, with captions that state each option.

A captioner that only writes captions cannot name a letter. It answers by the most probable of the captions that state
the options (`rollouts.answering`), in the grammar of `scene_captions`. Numbers and relations are not among its
captions, so these two categories have no such statements.
"""

import dataclasses
import string
from collections.abc import Callable, Sequence

import numpy as np

from uae_jax.data.questions import YES_NO, Question, Statement, question_text, yes_no_text
from uae_jax.data.scene_captions import NUMBERS, RELATIONS, holds, noun, phrase
from uae_jax.data.scenes import COLUMNS, ROWS, PlacedObject, Scene, object_facts
from uae_jax.data.sources import SceneSource

CHOICES = 4  # options of a question, at most
PLACES = tuple(f"{row} {column}" for row in ROWS for column in COLUMNS)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question before its options are ordered.

    Attributes:
      text: the question alone.
      right: the answer: a value, or Yes or No.
      wrong: the other values.
      statements: captions that state a value; None where no caption does.
    """

    text: str
    right: str
    wrong: tuple[str, ...]
    statements: Callable[[str], tuple[Statement, ...]] | None = None


Asker = Callable[[Scene, np.random.Generator], Asked | None]


def _one(values: Sequence, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


def _some(values: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
    """Wrong values in random order, as many as a question has room for."""
    return tuple(values[int(place)] for place in rng.permutation(len(values))[: CHOICES - 1])


def _with(item: PlacedObject, name: str, value: str) -> PlacedObject:
    return dataclasses.replace(item, **{name: value})


def _colour(scene: Scene, rng: np.random.Generator) -> Asked | None:
    if "colour" not in scene.values:
        return None
    item, noun_name = _one(scene.objects, rng), scene.objects[0].fact_names[0]
    right = object_facts(item)["colour"]
    return Asked(
        f"What colour is the {noun(item)} at the {item.position}?",
        right,
        _some([value for value in scene.values["colour"] if value != right], rng),
        lambda value: (Statement(phrase(_with(item, "colour", value), ("position", "colour", noun_name))),),
    )


def _shape(scene: Scene, rng: np.random.Generator) -> Asked:
    item, noun_name = _one(scene.objects, rng), scene.objects[0].fact_names[0]
    return Asked(
        f"What is at the {item.position}?",
        noun(item),
        _some([value for value in scene.values[noun_name] if value != noun(item)], rng),
        lambda value: (Statement(phrase(_with(item, noun_name, value), ("position", noun_name))),),
    )


def _size(scene: Scene, rng: np.random.Generator) -> Asked:
    item, size = _one(scene.objects, rng), _one(scene.values["size"], rng)
    names = ("position", "size", item.fact_names[0])
    said = {value: phrase(_with(item, "size", value), names) for value in scene.values["size"]}
    return _closed(
        f"Is the {noun(item)} at the {item.position} {size}?", size == object_facts(item)["size"], size, said
    )


def _background(scene: Scene, rng: np.random.Generator) -> Asked:
    other = _one([value for value in scene.backgrounds if value != scene.background], rng)
    asked = scene.background if rng.random() < 0.5 else other
    said = {value: f"{value} background" for value in scene.backgrounds}
    return _closed(f"Is the background {asked}?", asked == scene.background, asked, said)


def _closed(text: str, true: bool, asked: str, said: dict[str, str]) -> Asked:
    """A question for yes or no: No is stated by the caption of any other value."""
    right, wrong = YES_NO if true else YES_NO[::-1]
    stated = {
        "Yes": (Statement(said[asked]),),
        "No": tuple(Statement(caption) for value, caption in said.items() if value != asked),
    }
    return Asked(text, right, (wrong,), stated.__getitem__)


def _position(scene: Scene, rng: np.random.Generator) -> Asked | None:
    """The places of other objects compete: of an empty place a caption says nothing.

    The place is given and the object is said, since a captioner prefers to begin with some places.
    """
    names = tuple(name for name in scene.objects[0].fact_names if name not in ("size", "position"))
    words = [phrase(item, names) for item in scene.objects]
    single = [item for item, said in zip(scene.objects, words) if words.count(said) == 1]
    if not single or len(words) < 2:
        return None
    item = _one(single, rng)
    others = [other.position for other in scene.objects if other.position != item.position]
    said = phrase(item, names)
    return Asked(
        f"Where is the {said}?", item.position, _some(others, rng), lambda value: (Statement(said, given=value),)
    )


def _presence(scene: Scene, rng: np.random.Generator) -> Asked | None:
    name = "colour" if "colour" in scene.values else scene.objects[0].fact_names[0]
    there = {object_facts(item)[name] for item in scene.objects}
    absent = [value for value in scene.values[name] if value not in there]
    if len(absent) < CHOICES - 1:
        return None
    item = _one(scene.objects, rng)
    return Asked(
        f"Which {name} does an object of the picture have?",
        object_facts(item)[name],
        _some(absent, rng),
        lambda value: tuple(Statement(f"{place} {value}") for place in PLACES),
    )


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    word = noun(_one(scene.objects, rng))
    number = sum(noun(item) == word for item in scene.objects)
    right = next(name for name, value in NUMBERS.items() if value == number)
    wrong = tuple(name for name in NUMBERS if name != right)
    return Asked(f"How many objects of the picture are a {word}?", right, wrong)


def _relation(scene: Scene, rng: np.random.Generator) -> Asked | None:
    nouns = [noun(item) for item in scene.objects]
    single = [item for item in scene.objects if nouns.count(noun(item)) == 1]
    if len(single) < 2:
        return None
    first, second = (single[int(place)] for place in rng.permutation(len(single))[:2])
    relation = _one(RELATIONS, rng)
    right, wrong = YES_NO if holds(relation, first, second) else YES_NO[::-1]
    return Asked(f"Is the {noun(first)} {relation} the {noun(second)}?", right, (wrong,))


SPOKEN: dict[str, Asker] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "position": _position,
    "background": _background,
    "presence": _presence,
}
UNSPOKEN: dict[str, Asker] = {"count": _count, "relation": _relation}


def scene_questions(source: SceneSource, count: int, *, spoken: bool = False) -> list[Question]:
    """Questions about the first scenes of a source, in turn from each category; a function of its arguments.

    Args:
      source: of scenes, such as the test split.
      count: of questions.
      spoken: leave out the categories whose options no caption states.
    """
    first = source.scene_at(0)
    askers = SPOKEN if spoken else SPOKEN | UNSPOKEN
    if "colour" not in first.values:
        askers = {name: asker for name, asker in askers.items() if name != "colour"}
    names, found = tuple(askers), []
    for number in range(count):
        category, asked, place = names[number % len(names)], None, number
        while asked is None:  # a scene without such a fact; the next one of this question is nobody else's
            scene = source.scene_at(place)
            rng = np.random.default_rng([source.seed, place, number % len(names)])
            asked, place = askers[category](scene, rng), place + count
        found.append(_question(f"{category} {number}", category, asked, source, scene, rng))
    return found


def _question(
    index: str, category: str, asked: Asked, source: SceneSource, scene: Scene, rng: np.random.Generator
) -> Question:
    """The question with its options in random order."""
    closed = asked.right in YES_NO
    values = YES_NO if closed else (asked.right, *asked.wrong)
    order = range(len(values)) if closed else [int(place) for place in rng.permutation(len(values))]
    keys = YES_NO if closed else string.ascii_uppercase
    options = {key: values[place] for key, place in zip(keys, order)}
    row = {"question": asked.text} | ({} if closed else options)
    return Question(
        index,
        yes_no_text(row) if closed else question_text(row),
        options,
        next(key for key, value in options.items() if value == asked.right),
        category,
        lambda: [source.draw(scene)],
        {} if asked.statements is None else {key: asked.statements(value) for key, value in options.items()},
    )
