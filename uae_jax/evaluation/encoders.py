"""Encoders of the benchmarks: published image processing on the host, features, cosines.

The image processing equals that of PIL and torch. The cosine of an image and its caption is that of CLIPScore (arXiv
2104.08718).
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from uae_jax import trees
from uae_jax.evaluation.pairs import Pair, read_rgb
from uae_jax.files.paths import local_copies, to_path
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig
from uae_jax.models.encoders.features import AnyConfig
from uae_jax.models.encoders.features import image_features as features_of
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.encoders.weights import EncoderFolder, open_encoder

# name of the encoder -> kinds of folders that may hold it
KINDS = {"clip": ("clip",), "longclip": ("longclip", "clip"), "dinov2": ("dinov2",), "dinov3": ("dinov3",)}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclasses.dataclass(frozen=True)
class BenchEncoder:
    """An image encoder of the benchmark; its weights are not read yet.

    Attributes:
      name: `clip`, `longclip`, `dinov2` or `dinov3`.
      source: the image tower's folder or file.
      preprocess: its published image processing.
      float_resize: scale images to [0, 1] before resizing, so that they are never rounded (DINOv3).
    """

    name: str
    source: EncoderFolder
    preprocess: Preprocess
    float_resize: bool

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Pixels of an RGB image for the model, float32 `[S, S', 3]`; see `host_pixels`."""
        return host_pixels(self.preprocess, image, self.float_resize)


def open_bench_encoder(name: str, path: str | pathlib.Path) -> BenchEncoder:
    """Opens the folder of an encoder and reads its image processing, not its weights.

    Args:
      name: `clip`, `longclip`, `dinov2` or `dinov3`.
      path: a folder as on the hub with `preprocessor_config.json`; for `longclip` a file or folder with OpenAI's
        parameter names. Long-CLIP always has the torchvision processing of its official code.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the folder holds another model, or its image processing is not supported.
    """
    source = open_encoder(path)
    if source.kind not in KINDS[name]:
        raise ValueError(f"--{name}={path} holds a {source.kind} model; give the folder of {name}")
    source = source.image_tower()
    config = source.config
    if name == "longclip" and isinstance(config, CLIPVisionConfig):
        preprocess = Preprocess.longclip(config.image_size)
    else:
        preprocess = source.preprocess()
    return BenchEncoder(name, source, preprocess, name == "dinov3")


def host_pixels(preprocess: Preprocess, image: Image.Image, float_resize: bool = False) -> np.ndarray:
    """Resizes, crops and normalises one image as the published processors do.

    PIL resizes 8-bit images (CLIPImageProcessor, BitImageProcessor, torchvision on PIL images). With `float_resize`,
    the image is first scaled to [0, 1]: torch's antialiased interpolation equals PIL's on float channels.

    Args:
      preprocess: sizes, filter, mean and standard deviation.
      image: in RGB.
      float_resize: see above.

    Returns:
      float32 `[S, S', 3]`.

    Raises:
      ValueError: the resized image is smaller than the crop.
    """
    height, width = preprocess.resized(image.height, image.width)
    filter_ = FILTERS[preprocess.method]
    if float_resize:
        channels = np.moveaxis(np.asarray(image, np.float32) / 255, -1, 0)
        x = np.stack(
            [np.asarray(Image.fromarray(channel).resize((width, height), filter_)) for channel in channels], -1
        )
    else:
        x = np.asarray(image.resize((width, height), filter_), np.float32) / 255
    for axis, side in enumerate(preprocess.crop):
        margin = x.shape[axis] - side
        if margin < 0:
            raise ValueError(f"an image resized to {width} x {height} is smaller than the crop of {side}")
        start = margin // 2 if preprocess.crop_offset == "floor" else round(margin / 2)
        x = x.take(range(start, start + side), axis)
    return (x - np.asarray(preprocess.mean, np.float32)) / np.asarray(preprocess.std, np.float32)


def _image_features(config: AnyConfig, params: trees.Tree, pixels: Array) -> Array:
    features = features_of(config, params, pixels).astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


_compiled_features = jax.jit(_image_features, static_argnums=0)


def image_features(encoder: BenchEncoder, params: trees.Tree, pixels: np.ndarray) -> np.ndarray:
    """Normalised features: CLIP's projection of the class token, DINO's class token after the last norm.

    Args:
      encoder: the encoder.
      params: of `encoder.source.load()`.
      pixels: float32 `[B, S, S', 3]` of `BenchEncoder.pixels`; compiled once for each B.

    Returns:
      float32 `[B, D]`, rows of length 1.
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(_compiled_features(encoder.source.config, params, pixels))


def pair_cosines(
    encoder: BenchEncoder, params: trees.Tree, pairs: Sequence[Pair], batch_size: int
) -> Iterator[tuple[Pair, float | str]]:
    """Yields each pair with its cosine, or with an error message if an image cannot be read.

    Images of the next batch are read while the current batch is encoded. All batches have one shape, so the encoder is
    compiled once.

    Args:
      encoder: the encoder.
      params: of `encoder.source.load()`.
      pairs: (image, reference).
      batch_size: pairs in one compiled call.
    """

    def read(pair: Pair) -> list[np.ndarray] | str:
        try:
            return [encoder.pixels(read_rgb(path)) for path in pair]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
        waiting: list[Future] = []
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
            waiting = waiting or [pool.submit(read, pair) for pair in batch]
            coming = [pool.submit(read, pair) for pair in following]
            results = [future.result() for future in waiting]
            yield from zip(batch, _cosines(encoder, params, results, batch_size))
            waiting = coming


def _cosines(
    encoder: BenchEncoder, params: trees.Tree, results: Sequence[list[np.ndarray] | str], size: int
) -> list[float | str]:
    read = [result for result in results if not isinstance(result, str)]
    if not read:
        return [result for result in results if isinstance(result, str)]
    filled = read + [read[-1]] * (size - len(read))
    features = image_features(encoder, params, np.stack([pixels for pair in filled for pixels in pair])).astype(
        np.float64
    )
    cosines = iter((features[0::2] * features[1::2]).sum(-1))
    found = [result if isinstance(result, str) else float(next(cosines)) for result in results]
    return [
        value if isinstance(value, str) or math.isfinite(value) else "the encoder's features have a non-finite number"
        for value in found
    ]


@dataclasses.dataclass(frozen=True)
class TextScorer:
    """CLIP with both towers and its tokenizer.

    Attributes:
      encoder: the image tower with its image processing.
      config: of both towers.
      params: of both towers.
      tokenizer: from transformers.
    """

    encoder: BenchEncoder
    config: CLIPConfig
    params: trees.Tree
    tokenizer: Any

    @property
    def positions(self) -> int:
        """The longest text in tokens, start and end included."""
        return self.config.text.max_position_embeddings

    def token_ids(self, text: str) -> tuple[np.ndarray, bool]:
        """Token ids `[T]` of a text, truncated before the end token or padded with 0, and whether truncated."""
        ids = list(self.tokenizer(text, split_special_tokens=True)["input_ids"])
        cut = len(ids) > self.positions
        ids = [*ids[: self.positions - 1], ids[-1]] if cut else ids
        return np.pad(np.array(ids, np.int32), (0, self.positions - len(ids))), cut


def open_text_scorer(folder: str | pathlib.Path, longclip: str | pathlib.Path | None = None) -> TextScorer:
    """Reads CLIP (77 tokens) with its tokenizer, or Long-CLIP (248 tokens) with CLIP's tokenizer.

    Args:
      folder: of a CLIPModel as on the hub, with its tokenizer.
      longclip: a Long-CLIP file that replaces the folder's weights.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the model is not CLIP with both towers, or a file cannot be read.
    """
    folder = to_path(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}); give the complete folder of CLIP"
        )
    source = open_encoder(longclip or folder)
    if not isinstance(source.config, CLIPConfig):
        raise ValueError(
            f"{source.path} holds no CLIP model with both towers; the text-image score needs one such as "
            "clip-vit-large-patch14"
        )
    from transformers import AutoTokenizer  # a slow import

    try:
        with local_copies(folder) as place:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error}); copy its files again") from error
    name = "longclip" if longclip else "clip"
    preprocess = Preprocess.longclip(source.config.vision.image_size) if longclip else source.preprocess()
    return TextScorer(BenchEncoder(name, source, preprocess, False), source.config, source.load(), tokenizer)


def _text_features(config: CLIPConfig, params: trees.Tree, ids: Array) -> Array:
    features = clip.text_features(config, params, ids)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


_compiled_text_features = jax.jit(_text_features, static_argnums=0)


def caption_cosines(
    scorer: TextScorer, files: Sequence[pathlib.Path], captions: Sequence[str], batch_size: int
) -> Iterator[tuple[float | str, bool]]:
    """Yields for each image its cosine with the caption, or an error message, and whether the caption is truncated.

    Args:
      scorer: CLIP or Long-CLIP.
      files: of the images.
      captions: one per image.
      batch_size: pairs in one compiled call.
    """
    for start in range(0, len(files), batch_size):
        pixels: list[np.ndarray | str] = []
        for file in files[start : start + batch_size]:
            try:
                pixels.append(scorer.encoder.pixels(read_rgb(file)))
            except ValueError as error:
                pixels.append(str(error))
        texts = [scorer.token_ids(caption) for caption in captions[start : start + batch_size]]
        blank = np.zeros((*scorer.encoder.preprocess.crop, 3), np.float32)
        filled = [blank if isinstance(image, str) else image for image in pixels] + [blank] * (batch_size - len(pixels))
        ids = np.stack([ids for ids, _ in texts] + [texts[-1][0]] * (batch_size - len(texts)))
        images = image_features(scorer.encoder, scorer.params, np.stack(filled))
        with jax.default_matmul_precision("highest"):
            said = np.asarray(_compiled_text_features(scorer.config, scorer.params, ids))
        cosines = (images.astype(np.float64) * said).sum(-1)
        for image, (_, cut), cosine in zip(pixels, texts, cosines):
            yield (image if isinstance(image, str) else float(cosine)), cut
