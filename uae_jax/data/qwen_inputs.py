"""Qwen2.5-VL's image processing and positions on the host, and the fixed-shape row of every stage.

Equal to transformers' Qwen2VLImageProcessorPil, `get_vision_window_index`, `get_vision_position_ids` and
`Qwen2_5_VLModel.get_rope_index` for images, without torch. A grid is (rows, columns) of one image in patches.
"""

import dataclasses
import math
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from uae_jax.data.images import to_rgb
from uae_jax.files.json_files import image_processor_settings
from uae_jax.files.known_fields import check_kinds, refuse_unknown, without_none
from uae_jax.files.paths import to_path

MAX_ASPECT = 200

# steps that are always done, and what has no effect on an image
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_NOT_SETTINGS = frozenset({*_STEPS, "size", "image_processor_type", "processor_class", "default_to_square"})
_WHOLE = {"data_format": "channels_first"}

Grid = tuple[int, int]
# named values of one row, without a batch axis
Fields = dict[str, np.ndarray | np.generic]


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size with sides divisible by `factor` and an area within [min_pixels, max_pixels].

    Raises:
      ValueError: a side of 0, or an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise ValueError(f"the image is {width} x {height} pixels: it has no content")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"the image is {width} x {height} pixels: an aspect ratio above {MAX_ASPECT}; crop it first")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Settings of preprocessor_config.json, and `window_size` in pixels of the model's vision config.

    Raises:
      ValueError: a window smaller than one merged patch.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = 3
    window_size: int = 112

    def __post_init__(self):
        if self.window_size // self.merge_size // self.patch_size < 1:
            raise ValueError(
                f"an attention window of {self.window_size} pixels is smaller than one merged patch "
                f"({self.merge_size} x {self.patch_size})"
            )

    @property
    def patch_width(self) -> int:
        """Width of a flattened patch: 3 * temporal * patch * patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def grid_of(self, height: int, width: int) -> Grid:
        """Patch rows and columns of an image of this size in pixels; errors of `smart_resize`."""
        rows, columns = smart_resize(height, width, self.patch_size * self.merge_size, self.min_pixels, self.max_pixels)
        return rows // self.patch_size, columns // self.patch_size

    def image_tokens(self, grid: Grid) -> int:
        """Tokens of an image in the language model (merged patches)."""
        return grid[0] * grid[1] // self.merge_size**2

    def __call__(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, Grid]:
        """Resizes (PIL bicubic, 8 bit), rescales and normalises one image and splits it into patches.

        Args:
          image: PIL image or uint8 array (see `to_rgb`).

        Returns:
          patches: float32 [P, 3 * temporal * patch * patch], each merge group contiguous, channels first inside a
            patch, the single frame repeated `temporal_patch_size` times.
          grid: (rows, columns), rows * columns = P.

        Raises:
          ValueError: no content, or an aspect ratio above 200.
        """
        image = to_rgb(image, upright=False)  # as the library; the readers of images turn them
        rows, columns = self.grid_of(image.height, image.width)
        size, merge = self.patch_size, self.merge_size
        image = image.resize((columns * size, rows * size), resample=self.resample)
        pixels = (np.asarray(image).astype(np.float64) * self.rescale_factor).astype(np.float32)
        pixels = (pixels - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        blocks = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
        blocks = np.repeat(blocks, self.temporal_patch_size, axis=5)
        return np.ascontiguousarray(blocks.reshape(rows * columns, self.patch_width)), (rows, columns)


def load_image_processor(folder: str | pathlib.Path, window_size: int) -> ImageProcessor:
    """Reads the image processor of a Qwen2-VL or Qwen2.5-VL folder; `window_size` in pixels.

    It is preprocessor_config.json, or `image_processor` in the processor_config.json of transformers 5.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is not JSON, describes another processor, disables a step, or sets what is not known.
    """
    older, newer = (to_path(folder) / name for name in ("preprocessor_config.json", "processor_config.json"))
    path, config = older if older.is_file() or not newer.is_file() else newer, image_processor_settings(folder)
    config = without_none(config, str(path))
    kind = str(config.get("image_processor_type", "Qwen2VLImageProcessor"))
    if not kind.startswith(("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor")):
        raise ValueError(f"{path} is for {kind}: a Qwen2-VL image processor is needed")
    for step in _STEPS:
        if config.get(step, True) is not True:
            raise ValueError(f"{path} sets {step} to {config[step]}: the model needs every step of the processor")
    size = without_none(config.get("size") or {}, f"{path}: size")
    names = {field.name for field in dataclasses.fields(ImageProcessor)}
    refuse_unknown(config, names | _NOT_SETTINGS, _WHOLE, f"{path}: ")
    known = {field.name: config.get(field.name) for field in dataclasses.fields(ImageProcessor)}
    # the older names win over "size", as in the library
    known["min_pixels"] = known["min_pixels"] or size.get("shortest_edge")
    known["max_pixels"] = known["max_pixels"] or size.get("longest_edge")
    known["window_size"] = window_size
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items() if v is not None}
    check_kinds(values, typing.get_type_hints(ImageProcessor), f"{path}: ", zero=("resample",))
    for name in ("image_mean", "image_std"):
        if len(values.get(name, (0, 0, 0))) != 3 or name == "image_std" and 0 in values.get(name, ()):
            raise ValueError(f"{path}: {name} is {values[name]}; it must be three numbers, and no standard deviation 0")
    if values.get("resample", 3) > 5:
        raise ValueError(f"{path}: resample is {values['resample']}; PIL has the filters 0 to 5")
    return ImageProcessor(**values)


def patch_layout(
    grids: Sequence[Grid], merge_size: int, window_size: int, patch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, window and image of each patch of a row of images, in the processor's order.

    Args:
      grids: (rows, columns) of each image in patches.
      merge_size, patch_size: of the processor.
      window_size: of the vision config, in pixels.

    Returns:
      positions: int32 [P, 2], (row, column) of the patch in its image (rotary positions).
      windows: int32 [P], attention window, unique over all images.
      images: int32 [P], index of the image.
    """
    side = window_size // merge_size // patch_size
    positions, windows, images = [], [], []
    first_window = 0
    for index, (rows, columns) in enumerate(grids):
        where = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1)
        where = where.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
        where = where.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
        window = where // merge_size // side
        across = int(window[:, 1].max()) + 1
        positions.append(where)
        windows.append(first_window + window[:, 0] * across + window[:, 1])
        images.append(np.full(len(where), index))
        first_window = int(windows[-1].max()) + 1
    positions, windows, images = (np.concatenate(part).astype(np.int32) for part in (positions, windows, images))
    return positions, windows, images


def mrope_positions(
    ids: Sequence[int], grids: Sequence[Grid], image_pad: int, merge_size: int
) -> tuple[np.ndarray, int]:
    """Multimodal rotary positions of a prompt (Qwen2.5-VL section 2.1.3, `get_rope_index`).

    A text token advances all three axes by one. The tokens of an image share one time and add the row and column in the
    merged grid. The text continues after the longer side.

    Args:
      ids: prompt tokens [T], image pads expanded.
      grids: (rows, columns) of each image in patches.
      image_pad: id of the image token.
      merge_size: of the processor.

    Returns:
      positions: int32 [T, 3], (time, row, column).
      following: the first position after the prompt.

    Raises:
      ValueError: the image tokens do not match the grids.
    """
    pads = np.asarray(ids) == image_pad
    sizes = [rows * columns // merge_size**2 for rows, columns in grids]
    if int(pads.sum()) != sum(sizes):
        raise ValueError(
            f"the prompt holds {int(pads.sum())} image tokens but its images have "
            f"{sum(sizes)} merged patches: expand the prompt with caption_prompt_ids"
        )
    positions = np.zeros((len(pads), 3), np.int32)
    at, current, image = 0, 0, 0
    while at < len(pads):
        if not pads[at]:
            positions[at] = current
            at, current = at + 1, current + 1
            continue
        span = slice(at, at + sizes[image])
        if not pads[span].all():
            raise ValueError(f"image {image} of the prompt is interrupted by another token")
        rows, columns = (side // merge_size for side in grids[image])
        grid = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij"), -1)
        positions[span] = current + grid.reshape(-1, 3)
        at, current, image = span.stop, current + max(rows, columns), image + 1
    return positions, current


def pad_to(values: Sequence[Any] | np.ndarray, length: int, fill: float = 0) -> np.ndarray:
    """Right-pads the first axis to `length` with `fill`.

    Raises:
      ValueError: more than `length` values; this function never truncates.
    """
    values = np.asarray(values)
    if len(values) > length:
        raise ValueError(f"{len(values)} values do not fit in {length}")
    return np.pad(values, [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)], constant_values=fill)


def prompt_fields(
    ids: Sequence[int],
    images: Sequence[tuple[np.ndarray, Grid]],
    processor: ImageProcessor,
    image_pad: int,
    max_patches: int,
    max_prompt: int,
) -> Fields:
    """The captioner's inputs of one row (no batch axis), right-padded to fixed shapes.

    Args:
      ids: prompt tokens, image pads expanded.
      images: (patches, grid) of each image, from `ImageProcessor`.
      processor: of the images.
      image_pad: id of the image token.
      max_patches, max_prompt: fixed lengths P and Tp.

    Returns:
      patches [P, D], patch_positions [P, 2], patch_windows [P] and patch_images [P] (both -1 in the padding),
      prompt_ids [Tp], prompt_mask [Tp], prompt_positions [Tp, 3], prompt_next [].

    Raises:
      ValueError: image tokens and patches differ, or the row is too long; images and prompts are never truncated.
    """
    grids = [grid for _, grid in images]
    patches = np.concatenate([patches for patches, _ in images]) if images else np.zeros((0, processor.patch_width))
    if len(patches) > max_patches:
        raise ValueError(
            f"the images have {len(patches)} patches, max_patches is {max_patches}: raise max_patches, or lower "
            "max_pixels of the image processor"
        )
    if len(ids) > max_prompt:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, max_prompt is {max_prompt}: raise max_prompt (a prompt is never "
            "truncated, an image would lose its last tokens)"
        )
    positions, following = mrope_positions(ids, grids, image_pad, processor.merge_size)
    layout = (
        (np.zeros((0, 2), np.int32), np.zeros(0, np.int32), np.zeros(0, np.int32))
        if not grids
        else patch_layout(grids, processor.merge_size, processor.window_size, processor.patch_size)
    )
    return {
        "patches": pad_to(patches.astype(np.float32, copy=False), max_patches),
        "patch_positions": pad_to(layout[0], max_patches),
        "patch_windows": pad_to(layout[1], max_patches, -1),
        "patch_images": pad_to(layout[2], max_patches, -1),
        "prompt_ids": pad_to(np.asarray(ids, np.int32), max_prompt),
        "prompt_mask": np.arange(max_prompt) < len(ids),
        "prompt_positions": pad_to(positions, max_prompt),
        "prompt_next": np.int32(following),
    }
