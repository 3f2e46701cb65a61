"""The one reader of images: files, bytes and PIL images to upright RGB of 8 bits, and the image files of a folder.

Whatever a decoder raises becomes one ValueError that names the file, so that one bad file never ends the work on the
others.
"""

import contextlib
import functools
import glob
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from uae_jax.files.paths import files_below, is_url, matching, to_path

# formats that Pillow knows by name and cannot decode by itself
UNDECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# images that Pillow cannot decode without a plug-in: they are listed too, so that reading them names them
OTHERS = (".heic", ".heif", ".jxl", ".avif", ".webp", ".cr2", ".nef", ".arw", ".dng")
# values of EXIF's orientation that exchange width and height
LYING = (5, 6, 7, 8)
# a wider image is cropped before it is resized
ORDINARY_ASPECT = 4


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of image files, lower case: all that Pillow's registry can open, and some that need a plug-in."""
    known = Image.registered_extensions()
    return frozenset({end for end, kind in known.items() if kind in Image.OPEN and kind not in UNDECODED} | {*OTHERS})


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of an image, and is not hidden, as `._a.png` is."""
    file = os.path.basename(name)
    return os.path.splitext(file)[1].lower() in image_suffixes() and not file.startswith(".")


def to_rgb(image: Image.Image | np.ndarray, *, upright: bool = True) -> Image.Image:
    """Any PIL image, or uint8 [H, W], [H, W, 3] or [H, W, 4], as RGB, with transparency on white.

    More than 8 bits become 8: 16 bits by their depth, other numbers by their range (see `eight_bits`).

    Args:
      image: the image.
      upright: turn it as its EXIF says.

    Raises:
      ValueError: an array of another shape or type, an image without content, or values that are not finite.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or image.ndim == 3 and image.shape[-1] in (3, 4)):
            raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
        if image.size == 0:
            raise ValueError(f"the image is {image.shape[1]} x {image.shape[0]} pixels: it has no content")
        image = Image.fromarray(image)
    if min(image.size) < 1:
        raise ValueError(f"the image is {image.width} x {image.height} pixels: it has no content")
    image = eight_bits(ImageOps.exif_transpose(image) if upright else image.copy())
    if image.mode == "La":
        image = image.convert("LA")
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)  # of 16 bits, of which Pillow keeps the upper
    if "A" in image.getbands() or image.mode == "RGBa" or clear is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as grey of 8 bits, with what is transparent in white; else the image itself.

    Integers in 0..65535 have 16 bits. Floats in [0, 1] and [0, 255] keep their meaning. All others are stretched from
    their least to their greatest value.

    Raises:
      ValueError: values that are not finite.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels hold NaN or infinity")
    low, high = values.min(), values.max()
    if low >= 0 and image.mode.startswith("I") and high <= 65535:
        low, high = 0.0, 65535.0
    elif low >= 0 and image.mode == "F" and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    bits = np.rint((values - low) * (255 / max(high - low, 1e-30))).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        bits[values == clear] = 255
    return Image.fromarray(bits)


@contextlib.contextmanager
def opened(
    source: str | os.PathLike[str] | bytes,
    name: str | None = None,
    prepare: Callable[[Image.Image], object] = lambda image: None,
) -> Iterator[Image.Image]:
    """An image of a file or of bytes, decoded; what is done with it inside of the context is guarded too.

    Args:
      source: path or content of the file.
      name: for messages; None for the path.
      prepare: called with the image before it is decoded.

    Raises:
      FileNotFoundError: no such file, or a link to none.
      ValueError: not an image, or a damaged image, whatever the decoder raised.
    """
    name = name or str(source)
    if not isinstance(source, bytes) and is_url(source):
        source = read_content(to_path(source))
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise FileNotFoundError(_absence(to_path(source)))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            prepare(image)
            image.load()
            yield image
    except Exception as error:  # decoders raise struct.error, TypeError, RuntimeError and more on damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no known format" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is not a readable image ({reason}): replace or remove it") from error


def _absence(path: pathlib.Path) -> str:
    if path.is_symlink():
        return f"image {path} does not exist: it is a broken link to {os.readlink(path)}"
    return f"image {path} does not exist"


def read_content(path: pathlib.Path) -> bytes:
    """The content of an image file, not decoded.

    Raises:
      FileNotFoundError: no such file, or a link to none.
    """
    if is_url(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(_absence(path)) from None
    if not path.is_file():
        raise FileNotFoundError(_absence(path))
    return path.read_bytes()


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as RGB, uint8 [H, W, 3]; see `to_rgb` and the errors of `opened`."""
    with opened(path) as image:
        return np.array(to_rgb(image))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decodes the content of an image file as RGB, uint8 [H, W, 3]; `name` stands in the errors of `opened`."""
    with opened(content, name) as image:
        return np.array(to_rgb(image))


def decode_square(content: bytes, name: str, side: int, *, scaled: bool) -> np.ndarray:
    """Decodes the content of an image file as `square_image` makes it, uint8 [side, side, 3]; errors of `opened`.

    Args:
      content, name: of the file.
      side: in pixels.
      scaled: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, where its shorter side keeps `side` pixels, and cropped
        before it is resized. Its pixels differ by a few levels from those of the full size.
    """
    sizes: list[tuple[float, float]] = []

    def prepare(image: Image.Image) -> None:
        draft = image.draft(None, (side, side)) if scaled else None
        if draft and min(image.size) >= side:
            sizes.append(draft[1][2:])  # not whole: the last column may stand for a part of the others' width

    with opened(content, name, prepare) as image:
        if sizes:
            image = _cut(image, *sizes[0], side)
        return square_image(image, side)


def _cut(image: Image.Image, width: float, height: float, side: int) -> Image.Image:
    """The centre square of the first `width` by `height` pixels, resized to `side`, still as its EXIF turns it."""
    box = _centre(width, height, side)
    left, top, right, bottom = (round(edge) for edge in box)
    if box == (left, top, right, bottom) and right - left == side:
        return image.crop((left, top, right, bottom))
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def _centre(width: float, height: float, side: int) -> tuple[float, float, float, float]:
    """Edges of the square that a crop would keep after the shorter side was resized to `side`."""
    scale = side / min(width, height)
    wide, high = max(round(width * scale), side), max(round(height * scale), side)
    left, top = (wide - side) // 2, (high - side) // 2
    across, down = width / wide, height / high
    right, bottom = min((left + side) * across, width), min((top + side) * down, height)
    return left * across, top * down, right, bottom


def measure_image(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) of an upright image, all of whose content is decoded once; errors of `opened`.

    A JPEG is decoded at an eighth of its size: every byte is read and few pixels are computed.
    """
    sizes: list[tuple[int, int]] = []

    def prepare(image: Image.Image) -> None:
        sizes.append(image.size)
        image.draft(None, (1, 1))

    with opened(content, name, prepare) as image:
        lying = image.getexif().get(ExifTags.Base.Orientation, 1) in LYING
        to_rgb(image)
    width, height = sizes[0]
    return (width, height) if lying else (height, width)


def square_image(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Resizes the shorter side to `side` (PIL bicubic) and crops the centre: uint8 [side, side, 3].

    Raises:
      ValueError: an image without content, see `to_rgb`.
    """
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (side, side, 3):
        return image
    image = to_rgb(image)
    width, height = image.size
    if (width, height) == (side, side):
        return np.array(image)
    if max(width, height) <= ORDINARY_ASPECT * min(width, height):
        # not by `box`: its rounding differs by one in two of three photographs, and runs would not continue exactly
        scale = side / min(width, height)
        wide, high = max(round(width * scale), side), max(round(height * scale), side)
        left, top = (wide - side) // 2, (high - side) // 2
        image = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    else:  # all of 3000 x 1 pixels, resized, would be 2.4 GB
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=_centre(width, height, side))
    return np.array(image)


def walk_files(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """All files of a folder and its subfolders, by path; hidden files and folders are passed over.

    Broken links are listed, and linked folders followed once.
    """
    if is_url(folder):
        place = to_path(folder)
        names = [name.split("/") for name in files_below(place)]
        return [place / "/".join(parts) for parts in sorted(names) if not any(part.startswith(".") for part in parts)]
    found: list[str] = []
    seen = {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        found += [os.path.join(place, name) for name in files if not name.startswith(".")]
    found.sort(key=lambda file: file.split(os.sep))  # as paths are sorted, in a tenth of the time
    return [pathlib.Path(file) for file in found]


def find_images(paths: str | pathlib.Path | Iterable[str | pathlib.Path]) -> list[pathlib.Path]:
    """Image files in the given order; absent files and broken links are among them, so that reading names them.

    Args:
      paths: files, folders (their images by path, those of subfolders too) or glob patterns.

    Raises:
      FileNotFoundError: a folder without images, a pattern without matches, or none of the paths exists.
      ValueError: no paths.
    """
    found: list[pathlib.Path] = []
    absent: list[pathlib.Path] = []
    for entry in [paths] if isinstance(paths, (str, pathlib.Path)) else paths:
        path = to_path(entry)
        if path.is_dir():
            inside = [file for file in walk_files(path) if is_image_name(file.name)]
            if not inside:
                raise FileNotFoundError(f"folder {path} holds no images (such as .png, .jpg, .webp or .tif)")
            found += inside
        elif path.is_file() or path.is_symlink():
            found.append(path)
        elif glob.has_magic(str(entry)):
            matches = matching(str(entry))
            if not matches:
                raise FileNotFoundError(f"no image matches {entry}")
            found += [p for p in matches if p.is_file() or p.is_symlink()]
        else:
            absent.append(path)
            found.append(path)
    if not found:
        raise ValueError("no image given: name files, folders or patterns")
    if len(absent) == len(found):
        raise FileNotFoundError(_absence(absent[0]))
    return found
