"""Strips: a picture, its caption and the picture drawn from the caption alone, side by side."""

import functools
import importlib.util
from typing import TYPE_CHECKING

from uae_jax.files.paths import to_path

if TYPE_CHECKING:
    from PIL import Image, ImageFont

ELLIPSIS = "\u2026"
LINE = 1.3  # height of a line, in font sizes


@functools.cache
def font(size: int) -> "ImageFont.FreeTypeFont":
    """DejaVu Sans, which matplotlib brings: Latin, Greek, Cyrillic, Arabic and more, and the same on every machine.

    It has no Chinese, Japanese or Korean; such captions are whole in a strip's metadata.
    """
    from PIL import ImageFont

    found = importlib.util.find_spec("matplotlib")  # found, not imported: that takes a second
    if found is None or found.origin is None:
        raise ImportError("matplotlib is not installed; pip install matplotlib")
    fonts = to_path(found.origin).parent / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), size)


def wrapped(text: str, letters: "ImageFont.FreeTypeFont", width: int, rows: int) -> list[str]:
    """Lines no wider than `width` pixels; an ellipsis ends what is more than `rows` lines.

    A word that is wider than a line is broken.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and letters.getlength(longer) <= width:
            lines[-1] = longer
            continue
        pieces = _broken(word, letters, width)
        lines += pieces
    if len(lines) > rows:
        last = lines[rows - 1]
        while last and letters.getlength(last + ELLIPSIS) > width:
            last = last[:-1]
        lines = [*lines[: rows - 1], last.rstrip(" ,") + ELLIPSIS]
    return lines


def _broken(word: str, letters: "ImageFont.FreeTypeFont", width: int) -> list[str]:
    """A word in pieces that fit a line; scripts without spaces are one word."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and letters.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def square(image: "Image.Image", side: int) -> "Image.Image":
    """A square image `side` pixels wide; small images by nearest neighbours."""
    from PIL import Image

    kind = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
    return image.resize((side, side), kind)


def strip(original: "Image.Image", caption: str, drawn: "Image.Image", side: int = 256) -> "Image.Image":
    """Original, caption and drawing side by side, each `side` pixels square, with a gap of a 32nd around them.

    Args:
      original, drawn: square images.
      caption: the text between them; it ends in an ellipsis where it is too long.
      side: in pixels.
    """
    from PIL import Image, ImageDraw

    gap = side // 32
    whole = Image.new("RGB", (3 * side + 4 * gap, side + 2 * gap), "white")
    for column, image in ((0, original), (2, drawn)):
        whole.paste(square(image, side), (gap + column * (side + gap), gap))
    size = max(10, side // 21)
    lines = wrapped(caption, font(size), side, int(side / (size * LINE)))
    text, spacing = "\n".join(lines), size * (LINE - 1)
    draw = ImageDraw.Draw(whole)
    draw.multiline_text((2 * gap + side, gap), text, fill="black", font=font(size), spacing=spacing)
    return whole
