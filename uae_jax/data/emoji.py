"""Scenes composed of emoji by human designers: a small data set of real images.

A scene is a background of one or two colours with one to three emoji on a 2 x 2 grid of cells, each large or small. The
emoji come from a folder that `uae_jax.fetch_emoji` writes. Captions, parser and image checker are those of the built-in
scenes (`scene_captions`, `scene_checker`), with names in place of shapes and colours:

    blue above green background , top left large red apple , bottom right small octopus
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from uae_jax.data import scene_captions, scene_checker, scenes
from uae_jax.data.scene_checker import Grammar
from uae_jax.data.scenes import SIZES, PlacedObject, Scene
from uae_jax.data.sources import SceneSource
from uae_jax.files.paths import to_path

INDEX_FILE = "emoji.json"
MAX_EMOJI = 3
COLOURS = {
    "white": (255, 255, 255),
    "black": (25, 25, 30),
    "pink": (250, 175, 200),
    "yellow": (250, 225, 120),
    "green": (110, 190, 110),
    "blue": (105, 170, 245),
}
# the colours of the upper and the lower half by name
BACKGROUNDS = {name: (name, name) for name in COLOURS} | {
    f"{above} above {below}": (above, below) for above, below in itertools.permutations(COLOURS, 2)
}
# the longer side of an emoji as a fraction of its cell
_EXTENT = {"small": 0.56, "large": 0.94}


@dataclasses.dataclass(frozen=True, order=True)
class EmojiObject(PlacedObject):
    """An emoji: its `name` of one or two words, its `size`, and its cell."""

    name: str
    size: str
    fact_names: ClassVar[tuple[str, ...]] = ("name", "size", "position")

    def __post_init__(self):
        for value, known in ((self.size, SIZES), (self.row, (0, 1)), (self.column, (0, 1))):
            scenes.check_known(value, known)


@dataclasses.dataclass(frozen=True)
class EmojiScene(Scene[EmojiObject]):
    """A background name, objects in raster order, and the set of their images.

    Raises:
      ValueError: unknown background or name, or two objects in one cell.
    """

    emoji: "EmojiSet" = dataclasses.field(compare=False, repr=False)
    backgrounds: ClassVar[tuple[str, ...]] = tuple(BACKGROUNDS)

    def __post_init__(self):
        super().__post_init__()
        for item in self.objects:
            if item.name not in self.emoji.pictures:
                raise ValueError(f"the emoji in {self.emoji.folder} have no {item.name!r}")

    @property
    def values(self) -> dict[str, tuple[str, ...]]:
        """See `Scene`."""
        return self.emoji.values


class EmojiSet:
    """The emoji of a folder.

    Attributes:
      names: in the order of the index.
      pictures: images by name, RGBA, without the transparent margin.
      values: the possible facts of the scenes (see `Scene`).
      grammar, words: of captions.

    Raises:
      FileNotFoundError: the folder has no index, or an image of the index is missing.
      ValueError: the index cannot be read, or an image has another checksum.
    """

    def __init__(self, folder: str | pathlib.Path):
        self.folder = to_path(folder)
        self.pictures = {row["name"]: self._picture(row) for row in self._index()}
        self.names = tuple(self.pictures)
        self.values = {"name": self.names, "size": SIZES}
        self.grammar = Grammar(tuple(BACKGROUNDS), "name", self.names, {})
        words = (*scene_captions.GRAMMAR_WORDS, *COLOURS, *(word for name in self.names for word in name.split()))
        self.words = tuple(dict.fromkeys(words))
        self.sprite = functools.lru_cache(maxsize=None)(self._sprite)
        self.templates = functools.lru_cache(maxsize=2)(self._templates)

    def __reduce__(self) -> tuple[type["EmojiSet"], tuple[pathlib.Path]]:
        """Another process that reads opens the folder for itself."""
        return EmojiSet, (self.folder,)

    def _index(self) -> list[dict[str, Any]]:
        path = self.folder / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: fetch the emoji with `python -m uae_jax.fetch_emoji --folder={self.folder}`"
            )
        try:
            rows = json.loads(path.read_text())["emoji"]
            if not rows or not all({"name", "file", "sha256"} <= set(row) for row in rows):
                raise ValueError("no emoji are listed")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and fetch the emoji again") from error
        return rows

    def _picture(self, row: dict[str, Any]) -> Image.Image:
        path = self.folder / row["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: fetch the emoji again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            raise ValueError(f"{path} is not the image that was fetched (its checksum differs): fetch the emoji again")
        return cropped(content)

    def _sprite(self, name: str, size: str, side: int) -> np.ndarray:
        """An emoji centred in a cell of an image `side` pixels wide: float32 [side / 2, side / 2, 4] (read-only).

        Colours (0..255) are multiplied by the coverage in [0, 1]; the coverage is the last channel.
        """
        cell = side // 2
        sprite = np.zeros((cell, cell, 4), np.float32)
        drawn = np.asarray(scaled(self.pictures[name], max(1, round(_EXTENT[size] * cell))), np.float32)
        top, left = (cell - drawn.shape[0]) // 2, (cell - drawn.shape[1]) // 2
        coverage = drawn[..., 3:] / 255
        sprite[top : top + drawn.shape[0], left : left + drawn.shape[1]] = np.concatenate(
            [drawn[..., :3] * coverage, coverage], -1
        )
        sprite.flags.writeable = False
        return sprite

    def draw(self, scene: EmojiScene, side: int = 64) -> np.ndarray:
        """Renders a scene: uint8 [side, side, 3] in 0..255, a deterministic function of the scene.

        Raises:
          ValueError: `side` odd or below 16.
        """
        if side < 16 or side % 2:
            raise ValueError(f"emoji cannot be rendered {side} pixels wide: use an even number, at least 16")
        cell = side // 2
        image = np.empty((side, side, 3), np.float32)
        for row, colour in enumerate(BACKGROUNDS[scene.background]):
            image[row * cell : (row + 1) * cell] = COLOURS[colour]
        for item in scene.objects:
            there = image[item.row * cell : (item.row + 1) * cell, item.column * cell : (item.column + 1) * cell]
            sprite = self.sprite(item.name, item.size, side)
            there[:] = there * (1 - sprite[..., 3:]) + sprite[..., :3]
        return np.rint(image).astype(np.uint8)

    def sample_scene(self, rng: np.random.Generator) -> EmojiScene:
        """Samples a scene: one to three emoji in distinct cells (see `scenes.sample_cells`), half on one colour."""
        cells, kinds = scenes.sample_cells(rng, len(self.names), MAX_EMOJI)
        sizes = rng.integers(len(SIZES), size=len(cells))
        objects = tuple(
            EmojiObject(int(cell) // 2, int(cell) % 2, self.names[kind], SIZES[size])
            for cell, kind, size in zip(cells, kinds, sizes)
        )
        plain = rng.random() < 0.5
        choices = [name for name, (above, below) in BACKGROUNDS.items() if (above == below) == plain]
        return EmojiScene(choices[rng.integers(len(choices))], objects, self)

    def scene_at(self, split: str, index: int, seed: int = 0) -> EmojiScene:
        """Scene number `index` >= 0 of an endless stream of a split ("train" or "test"); see `split_of`.

        Raises:
          ValueError: unknown split.
        """
        return scenes.scene_at(split, index, seed, self.sample_scene, split_of)

    def _templates(self, side: int) -> np.ndarray:
        """All possible contents of a cell, empty first: float32 [colours, 1 + names * sizes, cell * cell * 3]."""
        nothing = np.zeros((side // 2, side // 2, 4), np.float32)
        sprites = np.stack([nothing, *(self.sprite(name, size, side) for name in self.names for size in SIZES)])
        grounds = np.array(list(COLOURS.values()), np.float32)[:, None, None, None, :]
        images = np.rint(grounds * (1 - sprites[None, ..., 3:]) + sprites[None, ..., :3])
        return images.reshape(len(COLOURS), len(sprites), -1)

    def read_pictures(self, pixels: np.ndarray) -> list[EmojiScene]:
        """Reads images [B, S, S, 3] in 0..255 with even S as the scenes of smallest squared error.

        Raises:
          ValueError: the array is not [B, S, S, 3] with even S.
        """
        scene_checker.check_pictures(pixels)
        errors = scene_checker.cell_errors(pixels, self.templates(pixels.shape[1]))
        choice = errors.argmin(-1)
        # both cells of a row have the row's colour
        grounds = errors.min(-1).reshape(len(pixels), 2, 2, -1).sum(2).argmin(-1)
        return [self._scene(*rows) for rows in zip(grounds, choice)]

    def _scene(self, grounds: np.ndarray, choice: np.ndarray) -> EmojiScene:
        colours = tuple(tuple(COLOURS)[ground] for ground in grounds)
        seen = [(cell, int(choice[cell, grounds[cell // 2]]) - 1) for cell in range(4)]
        objects = tuple(
            EmojiObject(cell // 2, cell % 2, self.names[kind // len(SIZES)], SIZES[kind % len(SIZES)])
            for cell, kind in seen
            if kind >= 0
        )
        background = next(name for name, both in BACKGROUNDS.items() if both == colours)
        return EmojiScene(background, objects, self)


def cropped(content: bytes) -> Image.Image:
    """An image from the bytes of its file, RGBA, without the transparent margin.

    Raises:
      ValueError: not an image, or a transparent one.
    """
    try:
        image = Image.open(io.BytesIO(content)).convert("RGBA")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"an emoji is not a readable image ({error}): fetch the emoji again") from error
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError("an emoji is completely transparent")
    return image.crop(box)


def scaled(image: Image.Image, extent: int) -> Image.Image:
    """The image resized to a longer side of `extent` pixels."""
    scale = extent / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _held_out(*parts: str) -> bool:
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def split_of(scene: EmojiScene) -> str:
    """The split of a scene: "test" for a combination or a layout that training never shows, else "train".

    By a stable hash of the words, one in ten pairs of different names is a held-out combination. One in ten triples of
    name, position and size is a held-out layout.
    """
    pairs = itertools.combinations(sorted({item.name for item in scene.objects}), 2)
    layouts = ((item.name, item.position, item.size) for item in scene.objects)
    held = any(_held_out("pair", *pair) for pair in pairs) or any(_held_out("layout", *layout) for layout in layouts)
    return "test" if held else "train"


@scene_checker.grammar_of.register
def _grammar_of(scene: EmojiScene) -> Grammar:
    return scene.emoji.grammar


@scene_checker.read_like.register
def _read_like(scene: EmojiScene, pixels: np.ndarray) -> list[EmojiScene]:
    return scene.emoji.read_pictures(pixels)


@dataclasses.dataclass(frozen=True)
class EmojiSource(SceneSource):
    """Scenes of emoji, with the settings of `SceneSource` and the images in `emoji`; see also `split_of`."""

    side: int = 64
    kind: ClassVar[str] = "emoji scene"
    emoji: EmojiSet = dataclasses.field(kw_only=True)

    def scene_at(self, index: int) -> EmojiScene:
        """Scene number `index` of the split."""
        return self.emoji.scene_at(self.split, index, self.seed)

    def draw(self, scene: EmojiScene) -> np.ndarray:
        """Renders a scene: uint8 [side, side, 3]."""
        return self.emoji.draw(scene, self.side)
