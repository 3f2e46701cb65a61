"""Random-access sources of captioned images: built-in scenes, a folder with captions.jsonl, any TFDS data set.

A source has a length and returns the same `Example` for the same index, as Grain needs to shuffle, shard and resume
exactly.
"""

import concurrent.futures
import dataclasses
import glob
import os
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, ImageOps

from uae_jax.data.qwen_inputs import to_rgb
from uae_jax.data.scene_captions import caption, mistaken, mixed_caption, random_detail_caption
from uae_jax.data.scenes import SPLITS, Scene, draw, scene_at
from uae_jax.files.json_files import json_objects

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTION_FILE = "captions.jsonl"
SCENE_CAPTIONS = ("full", "detail", "mixed", "short")


@dataclasses.dataclass(frozen=True)
class Example:
    """One captioned image: uint8 [H, W, 3], caption, a name for messages, and the scene if known."""

    image: np.ndarray
    caption: str
    id: str
    scene: Scene | None = None


class Source(Protocol):
    """Input of the loader: a length, and the same example for the same index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Built-in scenes, rendered `side` pixels wide.

    Attributes:
      split: "train" or "test" (disjoint).
      seed: of the stream of scenes.
      side: of the image in pixels.
      captions: "full", "detail" (random level of detail in [low, high]), "short" (prompts as in text to image: counts,
        relations, colours) or "mixed" (half short, half of random detail).
      low, high: levels of detail in [0, 1].
      mistakes: probability of a wrong fact (`scene_captions.mistaken`), as in captions from the web or from a model.
      length: number of scenes in one epoch.

    Raises:
      ValueError: an unknown split or kind of caption, a probability outside [0, 1], or not 0 <= low <= high <= 1.
    """

    split: str = "train"
    seed: int = 0
    side: int = 32
    captions: str = "detail"
    low: float = 0.1
    high: float = 1.0
    mistakes: float = 0.0
    length: int = 1_000_000
    kind: ClassVar[str] = "scene"

    def __post_init__(self):
        if self.split not in SPLITS or self.captions not in SCENE_CAPTIONS:
            raise ValueError(
                f"scenes have splits {SPLITS} and captions {SCENE_CAPTIONS}, not {self.split!r} and {self.captions!r}"
            )
        if not 0 <= self.mistakes <= 1:
            raise ValueError(f"mistakes is {self.mistakes}; it is a probability, from 0 to 1")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"levels of detail must be 0 <= low <= high <= 1, got {self.low} and {self.high}")

    def __len__(self) -> int:
        return self.length

    def scene_at(self, index: int) -> Scene:
        """Scene number `index` of the split."""
        return scene_at(self.split, index, self.seed)

    def draw(self, scene: Scene) -> np.ndarray:
        """Renders a scene: uint8 [side, side, 3]."""
        return draw(scene, self.side)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        scene = self.scene_at(index)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])
        seen = mistaken(scene, np.random.default_rng([self.seed, SPLITS.index(self.split), index, 2]), self.mistakes)
        if self.captions == "full":
            text = caption(seen)
        elif self.captions == "detail":
            text = random_detail_caption(seen, rng, self.low, self.high)
        else:
            text = mixed_caption(seen, rng, detail_probability=0.5 if self.captions == "mixed" else 0.0)
        return Example(self.draw(scene), text, f"{self.split} {self.kind} {index}", scene)


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as RGB, uint8 [H, W, 3], with the EXIF rotation applied and transparency on white.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an image, or a damaged image.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"image {path} does not exist")
    try:
        with Image.open(path) as image:
            return np.array(to_rgb(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}): replace or remove it") from error


def _check_image(path: pathlib.Path) -> str | None:
    """None for an image that decodes completely, else the error. JPEG is decoded at an eighth of its size."""
    if not path.is_file():
        return "the file does not exist"
    try:
        with Image.open(path) as image:
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None


def find_images(paths: str | pathlib.Path | Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """Image files in the given order.

    Args:
      paths: files, folders (their PNG, JPEG and WebP files by name) or glob patterns.

    Raises:
      FileNotFoundError: a missing path, a folder without images, a pattern without matches.
      ValueError: no paths.
    """
    found: list[pathlib.Path] = []
    for entry in [paths] if isinstance(paths, (str, pathlib.Path)) else paths:
        path = pathlib.Path(entry)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise FileNotFoundError(f"folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            matches = sorted(pathlib.Path(p) for p in glob.glob(str(entry)))
            if not matches:
                raise FileNotFoundError(f"image {entry} does not exist")
            found += [p for p in matches if p.is_file()]
    if not found:
        raise ValueError("no image given: name files, folders or patterns")
    return found


def _read_captions(path: pathlib.Path) -> list[tuple[str, tuple[str, ...]]]:
    """(file name, captions) of every line that is not blank."""
    rows = []
    for where, row in json_objects(path.read_bytes().split(b"\n"), path):
        name = row.get("file_name", row.get("image"))
        if not isinstance(name, str) or not name:
            raise ValueError(f'{where} names no image: write {{"file_name": ..., "caption": ...}}')
        captions = row.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        if (
            not isinstance(captions, list)
            or not captions
            or not all(isinstance(c, str) and c.strip() for c in captions)
        ):
            raise ValueError(f'{where} has no caption: give "caption" a text, or a list of texts')
        rows.append((name, tuple(captions)))
    if not rows:
        raise ValueError(f"{path} holds no captions: write one JSON object a line")
    return rows


class FolderSource:
    """A folder of images with captions.jsonl; each line is {"file_name" or "image": ..., "caption": text or texts}.

    All files are checked at the start, so that a bad file cannot stop a long run. Of n captions, example i gets number
    i modulo n.

    Args:
      folder: holds captions.jsonl and the images; file names are relative to the folder.
      check: also decode every image once (JPEG at an eighth of its size).

    Raises:
      FileNotFoundError: no folder, no captions.jsonl, or a missing image.
      ValueError: a broken line (the message has its number), or an image that cannot be decoded.
    """

    def __init__(self, folder: str | pathlib.Path, check: bool = True):
        self.folder = pathlib.Path(folder)
        path = self.folder / CAPTION_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: a data folder needs it beside its images")
        self.rows = _read_captions(path)
        files = {name: self.folder / name for name, _ in self.rows}
        for file in files.values():
            if not file.is_file():
                raise FileNotFoundError(f"image {file} does not exist, but {path} has a caption for it")
        if check:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                for file, problem in zip(files.values(), pool.map(_check_image, files.values())):
                    if problem:
                        raise ValueError(
                            f"{file} is not a readable image ({problem}): replace it, or remove its line from {path}"
                        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        name, captions = self.rows[index]
        return Example(load_image(self.folder / name), captions[index % len(captions)].strip(), name)


def _at(features: Any, key: str) -> Any:
    """The feature at "a/b"; for a list of dicts at "a", the list of their "b"."""
    for part in key.split("/"):
        features = [item[part] for item in features] if isinstance(features, (list, tuple)) else features[part]
    return features


class TfdsSource:
    """A TFDS data set of captioned images, read without TensorFlow (array_record or another random-access format).

    Args:
      name: such as "coco_captions" or "my_set:1.0.0".
      split: such as "train" or "train[:1000]".
      data_dir: folder of the prepared data set; None for the default of TFDS.
      image_key, caption_key: features by path, such as "image" and "captions/text". Captions may be bytes or text, one
        or several; of n captions, example i gets number i modulo n.

    Raises:
      ValueError: TFDS cannot open the data set, or the data set lacks these features.
    """

    def __init__(
        self, name: str, split: str, data_dir: str | None = None, image_key: str = "image", caption_key: str = "caption"
    ):
        import tensorflow_datasets as tfds  # slow import, needed only here

        self.name, self.split, self.image_key, self.caption_key = name, split, image_key, caption_key
        try:
            self.data: Any = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except Exception as error:
            raise ValueError(
                f"TFDS cannot open {name!r}, split {split!r}, in {data_dir or 'its default folder'} "
                f"({error}): prepare it with `tfds build --file_format=array_record`"
            ) from error
        if len(self.data) == 0:
            raise ValueError(f"TFDS data set {name!r} has no examples in split {split!r}")
        first: dict[str, Any] = self.data[0]
        for key in (image_key, caption_key):
            try:
                _at(first, key)
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"TFDS data set {name!r} has no feature {key!r}: it has {sorted(first)}") from error

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        features = self.data[index]
        captions = _at(features, self.caption_key)
        where = f"{self.name} {self.split} {index}"
        if isinstance(captions, np.ndarray):
            captions = captions.tolist()
        if isinstance(captions, (list, tuple)):
            if not captions:
                raise ValueError(f"TFDS example {where} has no caption")
            captions = captions[index % len(captions)]
        text = captions.decode("utf-8") if isinstance(captions, bytes) else str(captions)
        image = np.asarray(_at(features, self.image_key))
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        return Example(np.array(to_rgb(image)), text.strip(), where)
