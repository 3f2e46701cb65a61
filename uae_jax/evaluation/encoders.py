"""The benchmark's image encoders: each with its published image processing on the host, exactly as PIL and torch do
it.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from uae_jax import trees
from uae_jax.models.encoders import clip, dino
from uae_jax.models.encoders.config import CLIPConfig, CLIPVisionConfig, Dinov2Config, Dinov3Config
from uae_jax.models.encoders.preprocess import Preprocess
from uae_jax.models.encoders.weights import EncoderFolder, open_encoder

# name of the benchmark's encoder -> kinds of folders that it may be
KINDS = {"clip": ("clip",), "longclip": ("longclip", "clip"), "dinov2": ("dinov2",), "dinov3": ("dinov3",)}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
AnyConfig = CLIPConfig | CLIPVisionConfig | Dinov2Config | Dinov3Config


@dataclasses.dataclass(frozen=True)
class BenchEncoder:
    """An image encoder of the benchmark, opened but not read.

    Attributes:
      name: `clip`, `longclip`, `dinov2` or `dinov3`.
      source: the image tower's folder or file.
      preprocess: its published image processing.
      float_resize: whether images are scaled to [0, 1] before they are resized, and so never rounded (DINOv3).
    """

    name: str
    source: EncoderFolder
    preprocess: Preprocess
    float_resize: bool

    def pixels(self, image: Image.Image) -> np.ndarray:
        """An RGB image as the model takes it, float32 `[S, S', 3]`; see `host_pixels`."""
        return host_pixels(self.preprocess, image, self.float_resize)


def open_bench_encoder(name: str, path: str | pathlib.Path) -> BenchEncoder:
    """Recognises the folder of an encoder and reads its image processing, not its weights.

    Args:
      name: `clip`, `longclip`, `dinov2` or `dinov3`.
      path: a folder as on the hub with `preprocessor_config.json`; for `longclip` the file or folder of a state in
        OpenAI's names. Long-CLIP always has torchvision's processing of its official code.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it is another model, or its image processing is not supported.
    """
    source = open_encoder(path)
    if source.kind not in KINDS[name]:
        raise ValueError(f"--{name}={path} holds a {source.kind} model; give the folder of {name}")
    source = source.image_tower()
    preprocess = Preprocess.longclip(source.config.image_size) if name == "longclip" else source.preprocess()
    return BenchEncoder(name, source, preprocess, name == "dinov3")


def host_pixels(preprocess: Preprocess, image: Image.Image, float_resize: bool = False) -> np.ndarray:
    """Resizes, crops and normalises one image as the published processors do.

    8-bit images are resized by PIL (CLIPImageProcessor, BitImageProcessor, torchvision on PIL images). `float_resize`
    scales to [0, 1] first: torch's antialiased interpolation is PIL's on float channels.

    Args:
      preprocess: what to do.
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
    is_dino = isinstance(config, (Dinov2Config, Dinov3Config))
    features = (dino.cls_features if is_dino else clip.image_features)(config, params, pixels).astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


_compiled_features = jax.jit(_image_features, static_argnums=0)


def image_features(encoder: BenchEncoder, params: trees.Tree, pixels: np.ndarray) -> np.ndarray:
    """Features of length 1: CLIP's projection of the class token, DINO's class token after the last norm.

    Args:
      encoder: whose features.
      params: its parameters, as of `encoder.source.load()`.
      pixels: float32 `[B, S, S', 3]` as of `BenchEncoder.pixels`; compiled once for each B.

    Returns:
      float32 `[B, D]`.
    """
    with jax.default_matmul_precision("highest"):
        return np.asarray(_compiled_features(encoder.source.config, params, pixels))
