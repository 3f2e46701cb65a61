"""True captions of scenes at any level of detail, from one grammar over a vocabulary of under 64 words.

    caption    := clause { " , " clause }
    clause     := COLOUR "background" | phrase [ relation phrase | "and" phrase ]
    phrase     := [ NUMBER ] [ ROW COLUMN ] [ SIZE ] [ COLOUR ] ( SHAPE | "object" )
    relation   := "left of" | "right of" | "above" | "below"

Nouns stay singular ("two circle"), to keep the vocabulary small.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable

import numpy as np

from uae_jax.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    MAX_OBJECTS,
    ROWS,
    SHAPES,
    SIZES,
    PlacedObject,
    Scene,
    object_facts,
)

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
NUMBER_WORDS = {value: word for word, value in NUMBERS.items()}
RELATIONS = ("left of", "right of", "above", "below")
STYLES = ("detail", "single_object", "two_object", "counting", "colors", "position", "color_attr")
# the word of the caption prompt; no caption contains it
CAPTION_PROMPT = "describe"
_LINKS = (",", "and", "of", "object", "background", "above", "below")
_PLACES = (*SIZES, *ROWS, *COLUMNS, *NUMBERS, CAPTION_PROMPT)
# the grammar's words for any kind of object
GRAMMAR_WORDS = (*_LINKS, *_PLACES)
# the vocabulary of the built-in scenes
WORDS = (*_LINKS, *BACKGROUNDS, *COLOURS, *SHAPES, *_PLACES)
# of prompts (`scene_prompts`), which state neither size nor place nor background
_PROMPT_WORDS = frozenset((",", "and", *" ".join(RELATIONS).split(), *NUMBERS, *COLOURS, *SHAPES))
# of this salt a quarter of the texts of every kind of prompt is withheld
_SALT = "prompts 119: "
_STYLE_TRIALS = 8


def phrase(item: PlacedObject, names: tuple[str, ...] | None = None) -> str:
    """An object in words, with only the facts in `names` ("shape", "colour", "size", "position"); None for all."""
    names = item.fact_names if names is None else names
    words = [value for name, value in reversed(object_facts(item).items()) if name in names]
    return " ".join(words if item.fact_names[0] in names else [*words, "object"])


def holds(relation: str, first: PlacedObject, second: PlacedObject) -> bool:
    """Whether `first` is in `relation` to `second`. A diagonal neighbour is both beside and above or below.

    Raises:
      ValueError: unknown relation.
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}: expected one of {RELATIONS}")
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def mistaken(scene: Scene, rng: np.random.Generator, mistakes: float) -> Scene:
    """The scene with wrong facts: every fact except positions is replaced with probability `mistakes`."""

    def seen(value: str, values: Iterable[str]) -> str:
        others = [other for other in values if other != value]
        return others[rng.integers(len(others))] if rng.random() < mistakes else value

    items = tuple(
        dataclasses.replace(item, **{name: seen(getattr(item, name), values) for name, values in scene.values.items()})
        for item in scene.objects
    )
    return dataclasses.replace(scene, background=seen(scene.background, scene.backgrounds), objects=items)


def caption(scene: Scene, rng: np.random.Generator | None = None, detail: float = 1.0, shuffle: bool = False) -> str:
    """A true caption, "gray background , top left large red circle , bottom right small blue square" in full.

    Args:
      scene: the scene to describe.
      rng: random generator; needed for `detail` < 1 or `shuffle`.
      detail: in [0, 1]. Every object is kept with probability (1 + detail) / 2, and every fact of a kept object with
        probability `detail`. If nothing is left, the caption states one fact.
      shuffle: objects in random instead of raster order.

    Raises:
      ValueError: `detail` outside [0, 1], or a missing `rng`.
    """
    if not 0.0 <= detail <= 1.0:
        raise ValueError(f"detail is a probability: {detail} is not in [0, 1]")
    if rng is None and (detail < 1.0 or shuffle):
        raise ValueError("a caption below full detail, or shuffled, needs rng")
    count = len(scene.objects)
    said_first = tuple(reversed(scene.objects[0].fact_names)) if count else ()
    if rng is None or detail == 1.0:
        background, chosen = True, np.ones((count, len(said_first)), bool)
    else:
        background = rng.random() < detail
        chosen = (rng.random((count, len(said_first))) < detail) & (rng.random((count, 1)) < (1 + detail) / 2)
        if not background and not chosen.any():
            only = int(rng.integers(1 + chosen.size))
            background = only == 0
            chosen.flat[max(only - 1, 0)] = only > 0
    order = rng.permutation(count) if rng is not None and shuffle else range(count)
    clauses = [f"{scene.background} background"] if background else []
    for index in order:
        names = tuple(name for name, said in zip(said_first, chosen[index]) if said)
        if names:
            clauses.append(phrase(scene.objects[index], names))
    return " , ".join(clauses)


def withheld(text: str) -> bool:
    """Whether a short text is kept out of all training captions, so that prompts with it are unseen ones.

    It is one text in four by a stable hash of what it says: texts that differ in the order of their two phrases are
    withheld together. A text that states a size, a place or a background is no prompt and never withheld.
    """
    if not set(text.split()) <= _PROMPT_WORDS:
        return False
    digest = hashlib.blake2b((_SALT + _said(text)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 4 == 0


def _said(text: str) -> str:
    """The same words for the texts of one meaning, such as "a left of b" for "b right of a"."""
    for relation, opposite in (("right of", "left of"), ("below", "above")):
        first, found, second = text.partition(f" {relation} ")
        if found:
            return f"{second} {opposite} {first}"
    return " and ".join(sorted(re.split(" and | , ", text)))


def random_detail_caption(
    scene: Scene, rng: np.random.Generator, low: float = 0.1, high: float = 1.0, shuffle_probability: float = 0.25
) -> str:
    """A caption whose level of detail is uniform in [low, high], sometimes with the objects shuffled; not a `withheld`
    one.
    """
    while True:
        detail = float(rng.uniform(low, high))
        shuffle = shuffle_probability > 0 and bool(rng.random() < shuffle_probability)
        text = caption(scene, rng, detail, shuffle)
        if not withheld(text):
            return text


def noun(item: PlacedObject) -> str:
    """The noun for an object: the shape of a built-in object."""
    return getattr(item, item.fact_names[0])


def applicable_styles(scene: Scene) -> tuple[str, ...]:
    """The `STYLES` that can describe this scene truthfully."""
    nouns = [noun(item) for item in scene.objects]
    several = len(set(nouns)) > 1
    repeated = any(nouns.count(word) > 1 for word in nouns)
    coloured = all("colour" in item.fact_names for item in scene.objects)
    fits = {
        "detail": True,
        "single_object": bool(nouns),
        "colors": coloured and bool(nouns),
        "counting": repeated,
        "two_object": several,
        "position": several,
        "color_attr": coloured and several,
    }
    return tuple(style for style in STYLES if fits[style])


def style_caption(scene: Scene, style: str, rng: np.random.Generator) -> str:
    """A short true caption in the style of one GenEval tag, or of "detail" (random level of detail); it may be one that
    is `withheld`.

    "counting" states a shape (half the time with its colour) and the exact number. "position" and "color_attr" name two
    objects of different shape; "position" adds colours half the time.

    Raises:
      ValueError: the style does not apply to this scene (see `applicable_styles`).
    """
    if style not in applicable_styles(scene):
        raise ValueError(f"style {style!r} cannot describe this scene: it allows {applicable_styles(scene)}")
    if style == "detail":
        return random_detail_caption(scene, rng)
    items = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    plain = items[0].fact_names[:1]
    coloured = items[0].fact_names[:2] if "colour" in items[0].fact_names else plain
    if style in ("single_object", "colors"):
        return phrase(items[0], coloured if style == "colors" else plain)
    if style == "counting":
        return _counting(items, bool(rng.random() < 0.5))
    first = items[0]
    second = next(item for item in items if noun(item) != noun(first))
    names = coloured if style == "color_attr" or (style == "position" and rng.random() < 0.5) else plain
    link = "and"
    if style == "position":
        true = [relation for relation in RELATIONS if holds(relation, first, second)]
        link = true[int(rng.integers(len(true)))]
    return f"{phrase(first, names)} {link} {phrase(second, names)}"


def _counting(items: list[PlacedObject], with_colour: bool) -> str:
    nouns = [noun(item) for item in items]
    word = next(word for word in nouns if nouns.count(word) > 1)
    names = items[0].fact_names[:1]
    same = [item for item in items if noun(item) == word]
    colours = [object_facts(item)["colour"] for item in same] if "colour" in items[0].fact_names else []
    if with_colour and any(colours.count(colour) > 1 for colour in colours):
        names = items[0].fact_names[:2]
        colour = next(colour for colour in colours if colours.count(colour) > 1)
        same = [item for item in same if object_facts(item)["colour"] == colour]
    assert len(same) <= MAX_OBJECTS
    return f"{NUMBER_WORDS[len(same)]} {phrase(same[0], names)}"


def mixed_caption(scene: Scene, rng: np.random.Generator, detail_probability: float = 0.5, high: float = 1.0) -> str:
    """A training caption for text to image: with `detail_probability` of random detail up to `high`, else of another
    style; of random detail also where every style is likely `withheld`.
    """
    others = [style for style in applicable_styles(scene) if style != "detail"]
    if others and rng.random() >= detail_probability:
        for _ in range(_STYLE_TRIALS):
            text = style_caption(scene, others[int(rng.integers(len(others)))], rng)
            if not withheld(text):
                return text
    return random_detail_caption(scene, rng, high=high)
