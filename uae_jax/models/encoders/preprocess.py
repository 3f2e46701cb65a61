"""The encoders' image processing as a differentiable function inside a compiled program.

Three pipelines for CLIP are in use and give different features of one image: the published processor (shortest side
and centre crop, antialiased), the reward of the official cold start (squash to the square, bicubic without
antialiasing), and torchvision's (as the first, with a rounded crop offset). They are values of one class here.
"""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uae_jax.files.json_files import image_processor_settings
from uae_jax.files.known_fields import check_kinds, refuse_unknown, without_none

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# steps that are always done, with the values that they have in all published folders
_ALWAYS = {"do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True}
_READ = frozenset(
    """
    image_processor_type feature_extractor_type processor_class size crop_size do_resize do_center_crop do_normalize
    image_mean image_std resample default_to_square data_format use_square_size
    """.split()
)
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as in preprocessor_config.json
PILLOW_CUBIC, TORCH_CUBIC = -0.5, -0.75


def resize_matrix(
    n_in: int, n_out: int, method: str = "bicubic", antialias: bool = True, a: float = PILLOW_CUBIC
) -> Float[np.ndarray, "{n_out} {n_in}"]:
    """float32 weights of a one-dimensional resize: `output = matrix @ input`; rows sum to 1.

    Args:
      n_in: samples in.
      n_out: samples out.
      method: `bilinear` or `bicubic`.
      antialias: True widens the kernel when shrinking and truncates it at the border (PIL, torch with antialias);
        False repeats the border samples (torch without).
      a: the cubic kernel's parameter: -0.5 in PIL and in torch with antialias, -0.75 in torch without.

    Raises:
      ValueError: unknown method.
    """
    if method not in ("bilinear", "bicubic"):
        raise ValueError(f"resize method {method!r} is not supported; use bilinear or bicubic")
    scale = n_in / n_out
    centres = (np.arange(n_out) + 0.5) * scale - 0.5
    if antialias:
        distance = (np.arange(n_in)[None] - centres[:, None]) / max(scale, 1.0)
        weights = _kernel(distance, method, a)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    reach = 2 if method == "bicubic" else 1
    matrix = np.zeros((n_out, n_in))
    base = np.floor(centres).astype(int)
    for offset in range(1 - reach, reach + 1):
        taps = base + offset
        np.add.at(matrix, (np.arange(n_out), np.clip(taps, 0, n_in - 1)), _kernel(taps - centres, method, a))
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray, method: str, a: float) -> np.ndarray:
    """The interpolation kernel; the cubic one is Keys 1981 (IEEE TASSP 29(6), eq. 15 for a = -0.5)."""
    x = np.abs(x)
    if method == "bilinear":
        return np.maximum(1 - x, 0)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an encoder wants its images.

    Attributes:
      size: (height, width) after resizing, or (side,) for the shortest side with the aspect ratio kept, or () for none.
      crop: (height, width) cut from the centre, or () for none.
      method: `bilinear` or `bicubic`.
      antialias: see `resize_matrix`.
      a: see `resize_matrix`.
      mean: subtracted from each channel, in units of [0, 1].
      std: divides each channel.
      clip: whether values that the cubic kernel throws out of [0, 1] are clipped, as in 8-bit images.
      quantize: whether values are rounded to 1/255 after each direction, as PIL does with 8-bit images. For scores
        equal to PIL's; it has no gradient.
      crop_offset: `floor` (transformers) or `round` (torchvision) for odd margins.
    """

    size: tuple[int, ...] = (224,)
    crop: tuple[int, ...] = (224, 224)
    method: str = "bicubic"
    antialias: bool = True
    a: float = PILLOW_CUBIC
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    clip: bool = True
    quantize: bool = False
    crop_offset: str = "floor"

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path, variant: str = "published") -> "Preprocess":
        """What the folder's `preprocessor_config.json` says.

        Args:
          folder: of a published model; CLIP, BiT (DINOv2) and DINOv3 processors are known.
          variant: `published`, or `uae`: squash to the square, bicubic with a = -0.75, no antialiasing (the official
            cold start's reward).

        Raises:
          FileNotFoundError: neither preprocessor_config.json nor processor_config.json.
          ValueError: a setting or the variant is not supported.
        """
        return cls.from_dict(image_processor_settings(folder)).as_variant(variant)

    def as_variant(self, variant: str) -> "Preprocess":
        """These settings for `published`, the official cold start's for `uae` (see `from_folder`).

        Raises:
          ValueError: another word.
        """
        if variant == "published":
            return self
        if variant != "uae":
            raise ValueError(f"preprocessing variant {variant!r} is not known; use published or uae")
        square = self.crop or self.size
        return dataclasses.replace(
            self, size=(square[0], square[-1]), crop=(), method="bicubic", antialias=False, a=TORCH_CUBIC, clip=False
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Preprocess":
        """From the dictionary of a `preprocessor_config.json`; missing fields have the processor's defaults.

        Raises:
          ValueError: a resampling filter, a size or another setting that is not supported.
        """
        raw = without_none(raw, "preprocessor_config.json")
        kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "CLIPImageProcessor")
        dino3 = kind.startswith("DINOv3")
        refuse_unknown(raw, _READ, _ALWAYS, "preprocessor_config.json: ")
        resample = raw.get("resample", 2 if dino3 else 3)
        if isinstance(resample, bool) or not isinstance(resample, int) or resample not in RESAMPLE:
            raise ValueError(f"resample {resample!r} is not supported; use 2 (bilinear) or 3 (bicubic)")
        size = raw.get("size") or ({"height": 224, "width": 224} if dino3 else 224)
        crop = raw.get("crop_size") or 224
        has_crop = raw.get("do_center_crop")
        has_crop = not dino3 if has_crop is None else has_crop
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if dino3 else (CLIP_MEAN, CLIP_STD)
        if raw.get("do_normalize") is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
        else:
            mean, std = raw.get("image_mean") or mean, raw.get("image_std") or std
        three = tuple[float, float, float]
        check_kinds({"image_mean": mean, "image_std": std}, {"image_mean": three, "image_std": three})
        if 0 in std:
            raise ValueError(f"image_std is {list(std)}; a standard deviation of 0 cannot divide")
        return cls(
            size=() if raw.get("do_resize") is False else _sides(size),
            crop=(_sides(crop) * 2)[:2] if has_crop else (),
            method=RESAMPLE[resample],
            mean=tuple(mean),
            std=tuple(std),
        )

    @classmethod
    def longclip(cls, side: int = 224) -> "Preprocess":
        """Long-CLIP's torchvision pipeline (arXiv 2403.15378, official `model/longclip.py`)."""
        return cls(size=(side,), crop=(side, side), crop_offset="round")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, before the crop; the longer side is rounded down."""
        if len(self.size) != 1:
            return (self.size[0], self.size[1]) if self.size else (height, width)
        short, long = min(height, width), max(height, width)
        other = int(self.size[0] * long / short)
        return (self.size[0], other) if height <= width else (other, self.size[0])


def _sides(size: int | dict[str, int]) -> tuple[int, ...]:
    sides: tuple[Any, ...] = (size,)
    if isinstance(size, dict):
        names = ("shortest_edge",) if "shortest_edge" in size else ("height", "width")
        sides = tuple(size.get(name) for name in names)
    if all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 2**16 for side in sides):
        return sides
    raise ValueError(f"image size {size} is not supported; it needs shortest_edge, or height and width")


def clip_preprocessor(side: int) -> dict[str, Any]:
    """The `preprocessor_config.json` of a CLIP model with images of `side` pixels."""
    return dict(
        image_processor_type="CLIPImageProcessor",
        size=dict(shortest_edge=side),
        crop_size=dict(height=side, width=side),
        do_resize=True,
        do_center_crop=True,
        do_rescale=True,
        do_normalize=True,
        do_convert_rgb=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )


def apply(preprocess: Preprocess, pixels: Float[Array, "b height width c"]) -> Float[Array, "b height_out width_out c"]:
    """Resizes, crops and normalises images, in float32 at full precision.

    With the published settings the result is PIL's within its 8-bit rounding (two roundings: at most about 2/255,
    0.3/255 on average); with `quantize` it is PIL's.

    Args:
      preprocess: what to do.
      pixels: in [0, 1].

    Returns:
      float32, normalised.

    Raises:
      ValueError: the resized image is smaller than the crop.
    """
    x = pixels.astype(jnp.float32)
    _, height, width, _ = x.shape
    rows, columns = (_side_matrix(preprocess, (height, width), axis) for axis in (0, 1))
    x = _as_image(preprocess, jnp.einsum("bhwc,vw->bhvc", x, columns, precision="highest"))
    x = _as_image(preprocess, jnp.einsum("bhvc,uh->buvc", x, rows, precision="highest"))
    return (x - jnp.asarray(preprocess.mean, jnp.float32)) / jnp.asarray(preprocess.std, jnp.float32)


def _side_matrix(preprocess: Preprocess, shape: tuple[int, int], axis: int) -> np.ndarray:
    """Resize weights of one direction, only the rows inside the crop."""
    size = preprocess.resized(*shape)[axis]
    matrix = resize_matrix(shape[axis], size, preprocess.method, preprocess.antialias, preprocess.a)
    if not preprocess.crop:
        return matrix
    margin = size - preprocess.crop[axis]
    if margin < 0:
        raise ValueError(f"an image resized to {size} pixels is smaller than the crop of {preprocess.crop[axis]}")
    start = margin // 2 if preprocess.crop_offset == "floor" else int(round(margin / 2))
    return matrix[start : start + preprocess.crop[axis]]


def _as_image(preprocess: Preprocess, x: Array) -> Array:
    if preprocess.clip:
        x = jnp.clip(x, 0.0, 1.0)
    return jnp.round(x * 255.0) / 255.0 if preprocess.quantize else x
