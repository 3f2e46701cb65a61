"""Procedurally rendered scenes: the built-in data set.

A scene is a plain background with one to four objects on a 2 x 2 grid of cells. All facts of a scene are known. So
captions of any level of detail can be written (`scene_captions`), and captions and images can be checked exactly
(`scene_checker`). The stream of scenes is endless and addressed by index; the test split is disjoint from the training
split.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 175, 55),
    "blue": (40, 75, 235),
    "yellow": (245, 220, 40),
    "purple": (165, 45, 205),
    "cyan": (40, 215, 225),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "gray": (128, 128, 128), "brown": (115, 70, 30)}
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")
SPLITS = ("train", "test")
MAX_OBJECTS = 4
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}

# Half the extent of an object as a fraction of its cell.
_RADIUS = {"small": 0.23, "large": 0.44}
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True, order=True)
class PlacedObject:
    """The content of a cell: `row` (0 top, 1 bottom), `column` (0 left, 1 right).

    A subclass lists its facts in `fact_names`. The first is the noun; a caption states the facts in reverse order.
    """

    row: int
    column: int
    fact_names: ClassVar[tuple[str, ...]] = ("position",)

    @property
    def position(self) -> str:
        """The cell in words, such as "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


def check_known(value: object, known: tuple[object, ...]) -> None:
    """Raises ValueError for an unknown value of an object's attribute."""
    if value not in known:
        raise ValueError(f"a scene object has no {value!r}: expected one of {tuple(known)}")


@dataclasses.dataclass(frozen=True, order=True)
class SceneObject(PlacedObject):
    """One object: `shape`, `colour` and `size` by name, and its cell."""

    shape: str
    colour: str
    size: str
    fact_names: ClassVar[tuple[str, ...]] = ("shape", "colour", "size", "position")

    def __post_init__(self):
        for value, known in (
            (self.shape, SHAPES),
            (self.colour, tuple(COLOURS)),
            (self.size, SIZES),
            (self.row, (0, 1)),
            (self.column, (0, 1)),
        ):
            check_known(value, known)


Object = TypeVar("Object", bound=PlacedObject, covariant=True)


@dataclasses.dataclass(frozen=True)
class Scene(Generic[Object]):
    """A background name and the objects in raster order. A scene read from an image may have no objects.

    Raises:
      ValueError: unknown background, or two objects in one cell.
    """

    background: str
    objects: tuple[Object, ...]
    backgrounds: ClassVar[tuple[str, ...]] = tuple(BACKGROUNDS)

    def __post_init__(self):
        if self.background not in self.backgrounds:
            raise ValueError(f"a scene has no background {self.background!r}: expected one of {self.backgrounds}")
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))
        if len({(o.row, o.column) for o in self.objects}) != len(self.objects):
            raise ValueError("two objects of a scene share a cell: give each its own row and column")

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """The possible values of an object's facts by name, the noun first, without positions."""
        return VALUES


def object_facts(item: PlacedObject) -> dict[str, str]:
    """The facts of an object by name; shape, colour, size, position for a built-in object."""
    return {name: getattr(item, name) for name in item.fact_names}


def facts(scene: Scene) -> tuple[tuple[int, str, str], ...]:
    """All facts as (object index, name, value), with the background as (-1, "background", value).

    A built-in scene has one fact for the background and four for each object.
    """
    listed = [(-1, "background", scene.background)]
    for index, item in enumerate(scene.objects):
        listed += [(index, name, value) for name, value in object_facts(item).items()]
    return tuple(listed)


def fact_kinds(scene: Scene) -> tuple[str, ...]:
    """The names of the facts of such a scene, in the order of a full caption."""
    return "background", "position", *reversed(scene.values)


def _inside(shape: str, radius: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points (u right, v down, in cell widths from the centre) are inside a shape."""
    if shape == "circle":
        return u * u + v * v <= radius * radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.9 * radius
    if shape == "triangle":
        height = (v + radius) / (2 * radius)
        return (height >= 0) & (height <= 1) & (np.abs(u) <= height * radius)
    arm = 0.34 * radius
    return (np.minimum(np.abs(u), np.abs(v)) <= arm) & (np.maximum(np.abs(u), np.abs(v)) <= radius)


@functools.lru_cache(maxsize=256)
def coverage(shape: str, size: str, row: int, column: int, side: int) -> np.ndarray:
    """Antialiased coverage of every pixel by an object, float32 [side, side] in [0, 1] (read-only)."""
    ticks = (np.arange(side * _SUPERSAMPLING) + 0.5) / (side * _SUPERSAMPLING) * 2
    u, v = np.meshgrid(ticks - column - 0.5, ticks - row - 0.5)
    inside = _inside(shape, _RADIUS[size], u, v)
    mask = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean((1, 3), dtype=np.float32)
    mask.flags.writeable = False
    return mask


def draw(scene: Scene[SceneObject], side: int = 32) -> np.ndarray:
    """Renders a scene: uint8 [side, side, 3] in 0..255, a deterministic function of the scene.

    Raises:
      ValueError: `side` below 8.
    """
    if side < 8:
        raise ValueError(f"a scene cannot be rendered {side} pixels wide: use at least 8")
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    image = np.broadcast_to(background, (side, side, 3)).copy()
    for item in scene.objects:
        mask = coverage(item.shape, item.size, item.row, item.column, side)
        image += mask[..., None] * (np.array(COLOURS[item.colour], np.float32) - background)
    return np.rint(image).astype(np.uint8)


def sample_cells(rng: np.random.Generator, kinds: int, most: int = MAX_OBJECTS) -> tuple[np.ndarray, np.ndarray]:
    """One to `most` distinct cells, and the kind (below `kinds`) of the object in each; int [count] both.

    With probability 1/4 all objects are of the same kind, so that high counts are not rare.
    """
    count = int(rng.integers(1, most + 1))
    cells = rng.permutation(4)[:count]
    chosen = rng.integers(kinds, size=count)
    if rng.random() < 0.25:
        chosen[:] = chosen[0]
    return cells, chosen


def sample_scene(rng: np.random.Generator) -> Scene[SceneObject]:
    """Samples a scene: one to four objects in distinct cells, every attribute uniform (see `sample_cells`)."""
    cells, shapes = sample_cells(rng, len(SHAPES))
    count = len(cells)
    colours = rng.integers(len(COLOURS), size=count)
    sizes = rng.integers(len(SIZES), size=count)
    names = tuple(COLOURS)
    objects = tuple(
        SceneObject(int(cell) // 2, int(cell) % 2, SHAPES[shape], names[colour], SIZES[size])
        for cell, shape, colour, size in zip(cells, shapes, colours, sizes)
    )
    return Scene(tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))], objects)


def split_of(scene: Scene) -> str:
    """The split of a scene by a stable hash of its facts: one scene in ten is "test", the others are "train"."""
    digest = hashlib.blake2b(repr(facts(scene)).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % 10 == 0 else "train"


AnyScene = TypeVar("AnyScene", bound=Scene)


def scene_at(
    split: str,
    index: int,
    seed: int = 0,
    sample: Callable[[np.random.Generator], AnyScene] = sample_scene,
    split_of: Callable[[AnyScene], str] = split_of,
) -> AnyScene:
    """Scene number `index` >= 0 of an endless stream; a pure function of its arguments.

    Args:
      split, index, seed: the place in the stream of a split; another seed gives another stream.
      sample: makes a scene.
      split_of: the split of a scene.

    Raises:
      ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}: expected one of {SPLITS}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    while True:
        scene = sample(rng)
        if split_of(scene) == split:
            return scene
