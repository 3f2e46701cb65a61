"""Endless batches of training scenes for the bootstrap, by Grain so that the position can be saved.

The kind of scenes is a `World`: built-in shapes, or emoji. The phases use only the facts of a scene.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain.python as grain
import numpy as np

from uae_jax.data import emoji, scene_captions, scenes
from uae_jax.data.loader import to_signed
from uae_jax.data.qwen_inputs import Fields, pad_to
from uae_jax.data.scene_captions import caption

CELLS = 4


@dataclasses.dataclass(frozen=True)
class World:
    """Scenes of one kind.

    Attributes:
      words: of all captions and of the prompt.
      scene_at: `(split, index, seed) -> scene`.
      draw: `(scene, side) -> uint8 [side, side, 3]`.
      values, backgrounds: the possible facts of the scenes; see `scenes.Scene`.
    """

    words: tuple[str, ...]
    scene_at: Callable[[str, int, int], scenes.Scene]
    draw: Callable[[Any, int], np.ndarray]
    values: Mapping[str, tuple[str, ...]]
    backgrounds: tuple[str, ...]

    @property
    def attribute_classes(self) -> tuple[int, ...]:
        """Number of classes of each attribute of a cell: the noun or an empty cell, then the other facts."""
        first, *others = (len(values) for values in self.values.values())
        return 1 + first, *others

    @property
    def object_classes(self) -> int:
        """Number of classes of one cell: empty, or any combination of an object's facts."""
        return 1 + math.prod(len(values) for values in self.values.values())


SHAPE_WORLD = World(scene_captions.WORDS, scenes.scene_at, scenes.draw, scenes.VALUES, scenes.Scene.backgrounds)


def open_world(data: Any) -> World:
    """The world of `config.data`: `source` is `scenes`, or `emoji` with their `folder`.

    Raises:
      ValueError: another source.
      FileNotFoundError: no emoji in the folder.
    """
    if data.source == "scenes":
        return SHAPE_WORLD
    if data.source != "emoji":
        raise ValueError(f"config.data.source is {data.source!r}; the bootstrap knows scenes and emoji")
    found = emoji.EmojiSet(data.folder)
    return World(found.words, found.scene_at, found.draw, found.values, emoji.EmojiScene.backgrounds)


def stream(example: Callable[[int], Fields], batch_size: int):
    """An iterator over batches of `example(index)`, index = 0, 1, ...; each leaf `[B, ...]`."""
    return iter(grain.MapDataset.range(2**31 - 1).map(example).batch(batch_size).to_iter_dataset())


def pixels_of(world: World, scene: scenes.Scene, side: int) -> np.ndarray:
    """The image of a scene, float32 `[side, side, 3]` in [-1, 1]."""
    return to_signed(world.draw(scene, side))


def pad_ids(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads to int32 `[length]` and its mask bool `[length]`.

    Raises:
      ValueError: more than `length` ids.
    """
    if len(ids) > length:
        raise ValueError(f"{len(ids)} caption tokens do not fit into max_caption = {length}")
    return pad_to(np.array(ids, np.int32), length, pad), np.arange(length) < len(ids)


def edited(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The scene with one fact changed: a hard negative for contrastive learning."""
    position = int(rng.integers(-1, len(scene.objects)))
    if position < 0:
        others = [name for name in scene.backgrounds if name != scene.background]
        return dataclasses.replace(scene, background=others[rng.integers(len(others))])
    item = scene.objects[position]
    field, values = tuple(scene.values.items())[rng.integers(len(scene.values))]
    others = [value for value in values if value != getattr(item, field)]
    changed = dataclasses.replace(item, **{field: others[rng.integers(len(others))]})
    return dataclasses.replace(scene, objects=(*scene.objects[:position], changed, *scene.objects[position + 1 :]))


def full_caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """A caption with every fact, half the time in raster order and else in random order."""
    return caption(scene, rng, 1.0, shuffle=bool(rng.random() < 0.5))


def cell_classes(scene: scenes.Scene) -> np.ndarray:
    """int32 `[5]`: the class of each cell in raster order, then that of the background."""
    classes = np.zeros(CELLS + 1, np.int32)
    for item in scene.objects:
        number = 0
        for name, values in scene.values.items():
            number = number * len(values) + values.index(getattr(item, name))
        classes[2 * item.row + item.column] = 1 + number
    classes[CELLS] = scene.backgrounds.index(scene.background)
    return classes


def cell_attributes(scene: scenes.Scene) -> Fields:
    """`cell` int32 `[4, A]`, the attributes of each cell in raster order (first 0 = empty); `background` int32 `[]`."""
    cells = np.zeros((CELLS, len(scene.values)), np.int32)
    for item in scene.objects:
        known = [values.index(getattr(item, name)) for name, values in scene.values.items()]
        cells[2 * item.row + item.column] = 1 + known[0], *known[1:]
    return {"cell": cells, "background": np.int32(scene.backgrounds.index(scene.background))}
