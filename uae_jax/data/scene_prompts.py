"""GenEval for the built-in scenes: prompts in the benchmark's schema, and an exact checker instead of a detector.

Schema and tags follow GenEval (djghosh13/geneval: prompts/evaluation_metadata.jsonl); the classes are the scenes'
shapes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from uae_jax.data.scene_captions import NUMBER_WORDS, RELATIONS, holds, withheld
from uae_jax.data.scene_checker import fitting, read_picture
from uae_jax.data.scenes import COLOURS, MAX_OBJECTS, SHAPES, Scene

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TEXTS = ("unseen", "seen", "all")


def _entry(tag: str, include: list[dict], prompt: str) -> dict:
    return {"tag": tag, "include": include, "prompt": prompt}


def _all_prompts(tag: str) -> list[dict]:
    one = [{"class": shape, "count": 1} for shape in SHAPES]
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    if tag == "single_object":
        return [_entry(tag, [item], item["class"]) for item in one]
    if tag == "two_object":
        return [_entry(tag, [{"class": a, "count": 1}, {"class": b, "count": 1}], f"{a} and {b}") for a, b in pairs]
    if tag == "counting":
        return [
            _entry(tag, [{"class": shape, "count": count}], f"{NUMBER_WORDS[count]} {shape}")
            for shape in SHAPES
            for count in range(2, MAX_OBJECTS + 1)
        ]
    if tag == "colors":
        return [
            _entry(tag, [{"class": shape, "count": 1, "color": colour}], f"{colour} {shape}")
            for shape in SHAPES
            for colour in COLOURS
        ]
    if tag == "position":
        # as in the benchmark, the second object has the position relative to the first
        return [
            _entry(
                tag,
                [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}],
                f"{a} {relation} {b}",
            )
            for a, b in pairs
            for relation in RELATIONS
        ]
    return [
        _entry(
            tag, [{"class": a, "count": 1, "color": x}, {"class": b, "count": 1, "color": y}], f"{x} {a} and {y} {b}"
        )
        for a, b in pairs
        for x in COLOURS
        for y in COLOURS
        if x != y
    ]


def scene_prompts(
    per_tag: int, seed: int = 0, tags: tuple[str, ...] = TAGS, texts: str = "unseen"
) -> list[dict[str, Any]]:
    """`per_tag` prompts of every tag, `{"tag", "include", "prompt"}`; a deterministic function of the arguments.

    The prompts of a tag are shuffled once; a tag with fewer than `per_tag` prompts repeats them.

    Args:
      per_tag: prompts of a tag.
      seed: of the shuffling.
      tags: some of `TAGS`.
      texts: "unseen" for the texts that no training caption has (`scene_captions.withheld`), "seen" for the others, or
        "all".

    Raises:
      ValueError: unknown tag or kind of texts, or `per_tag` below 1.
    """
    if per_tag < 1 or set(tags) - set(TAGS) or texts not in TEXTS:
        raise ValueError(
            f"need per_tag >= 1, tags among {TAGS} and texts among {TEXTS}, got {per_tag}, {tuple(tags)}, {texts!r}"
        )
    chosen = []
    for tag in tags:
        every = [
            entry for entry in _all_prompts(tag) if texts == "all" or withheld(entry["prompt"]) == (texts == "unseen")
        ]
        order = np.random.default_rng([seed, TAGS.index(tag)]).permutation(len(every))
        chosen += [every[order[i % len(every)]] for i in range(per_tag)]
    return chosen


def _wanted(item: Mapping) -> tuple[tuple[str, str], ...]:
    claims = (("shape", item["class"]),)
    return claims + ((("colour", item["color"]),) if "color" in item else ())


def check_scene(metadata: Mapping, scene: Scene, *, exact: bool = False) -> bool:
    """Whether a scene satisfies one prompt's metadata.

    Every entry of "include" needs at least "count" fitting objects; the tag "counting" needs exactly that many. An
    entry with "position" also needs one of its objects in that relation to an object of the other entry.

    Args:
      metadata: of a prompt.
      scene: what was drawn.
      exact: the scene must have no other object, which the benchmark allows.
    """
    if exact and len(scene.objects) != sum(item["count"] for item in metadata["include"]):
        return False
    found = [fitting(scene, _wanted(item)) for item in metadata["include"]]
    for item, objects in zip(metadata["include"], found):
        enough = len(objects) == item["count"] if metadata["tag"] == "counting" else len(objects) >= item["count"]
        if not enough:
            return False
        if "position" in item:
            relation, other = item["position"]
            if not any(a is not b and holds(relation, a, b) for a in objects for b in found[other]):
                return False
    return True


def check_prompt(metadata: Mapping, pixels: np.ndarray) -> bool:
    """Whether an image, uint8 [S, S, 3] with even S, satisfies one prompt's metadata."""
    return check_scene(metadata, read_picture(pixels))
