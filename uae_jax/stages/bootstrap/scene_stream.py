"""Endless batches of training scenes for the bootstrap, through Grain so that their position is checkpointable."""

import dataclasses
from collections.abc import Callable

import grain.python as grain
import numpy as np

from uae_jax.data import scenes
from uae_jax.data.scene_captions import caption

CELLS = 4
# classes of one cell: nothing, or shape x colour x size; and of the background
OBJECT_CLASSES = 1 + len(scenes.SHAPES) * len(scenes.COLOURS) * len(scenes.SIZES)


def stream(example: Callable[[int], dict[str, np.ndarray]], batch_size: int):
    """An iterator of batches of `example(index)`, index = 0, 1, ...; each leaf `[B, ...]`."""
    return iter(grain.MapDataset.range(2**31 - 1).map(example).batch(batch_size).to_iter_dataset())


def pixels_of(scene: scenes.Scene, side: int) -> np.ndarray:
    """float32 `[side, side, 3]` in [-1, 1]."""
    return scenes.draw(scene, side).astype(np.float32) / 127.5 - 1


def pad_ids(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads to int32 `[length]` and its mask bool `[length]`.

    Raises:
      ValueError: there are more ids than room.
    """
    if len(ids) > length:
        raise ValueError(f"{len(ids)} caption tokens do not fit into max_caption = {length}")
    return np.array(ids + [pad] * (length - len(ids)), np.int32), np.arange(length) < len(ids)


def edited(scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
    """The scene with one fact changed: a hard negative for contrastive learning."""
    position = int(rng.integers(-1, len(scene.objects)))
    if position < 0:
        others = [name for name in scenes.BACKGROUNDS if name != scene.background]
        return scenes.Scene(others[rng.integers(len(others))], scene.objects)
    item = scene.objects[position]
    field, values = (("shape", scenes.SHAPES), ("colour", tuple(scenes.COLOURS)), ("size", scenes.SIZES))[rng.integers(3)]
    others = [value for value in values if value != getattr(item, field)]
    changed = dataclasses.replace(item, **{field: others[rng.integers(len(others))]})
    return scenes.Scene(scene.background, (*scene.objects[:position], changed, *scene.objects[position + 1 :]))


def full_caption(scene: scenes.Scene, rng: np.random.Generator) -> str:
    """Every fact, objects in raster order or, half the time, in any order."""
    return caption(scene, rng, 1.0, shuffle=bool(rng.random() < 0.5))


def cell_classes(scene: scenes.Scene) -> np.ndarray:
    """int32 `[5]`: the class of each cell in raster order, then that of the background."""
    classes = np.zeros(CELLS + 1, np.int32)
    for item in scene.objects:
        shape, colour, size = scenes.SHAPES.index(item.shape), list(scenes.COLOURS).index(item.colour), scenes.SIZES.index(item.size)
        classes[2 * item.row + item.column] = 1 + (shape * len(scenes.COLOURS) + colour) * len(scenes.SIZES) + size
    classes[CELLS] = list(scenes.BACKGROUNDS).index(scene.background)
    return classes


def cell_attributes(scene: scenes.Scene) -> dict[str, np.ndarray]:
    """`cell_shape` (0 = nothing), `cell_colour`, `cell_size` int32 `[4]` in raster order, and `background` int32 `[]`."""
    shape, colour, size = (np.zeros(CELLS, np.int32) for _ in range(3))
    for item in scene.objects:
        cell = 2 * item.row + item.column
        shape[cell] = 1 + scenes.SHAPES.index(item.shape)
        colour[cell], size[cell] = list(scenes.COLOURS).index(item.colour), scenes.SIZES.index(item.size)
    background = np.int32(list(scenes.BACKGROUNDS).index(scene.background))
    return {"cell_shape": shape, "cell_colour": colour, "cell_size": size, "background": background}
