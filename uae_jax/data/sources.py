"""Random-access sources of images: built-in scenes and any TFDS data set; folders are in `data.folder`.

A source has a length and returns the same `Example` for the same index, as Grain needs to shuffle, shard and resume
exactly.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import numpy as np

from uae_jax.data.images import to_rgb
from uae_jax.data.scene_captions import caption, mistaken, mixed_caption, random_detail_caption
from uae_jax.data.scenes import SPLITS, Scene, draw, scene_at

SCENE_CAPTIONS = ("full", "detail", "mixed", "short")


@dataclasses.dataclass(frozen=True)
class Example:
    """One image: uint8 [H, W, 3], its caption or None, a name for messages, and the scene if known."""

    image: np.ndarray
    caption: str | None
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
