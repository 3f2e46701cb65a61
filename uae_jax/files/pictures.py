"""Images, written completely or not at all."""

import io
import pathlib
from typing import TYPE_CHECKING, Any

from uae_jax.files.whole import write_bytes

if TYPE_CHECKING:
    from PIL import Image

SAVING: dict[str, dict[str, Any]] = {".png": dict(format="PNG"), ".jpg": dict(format="JPEG", quality=95, subsampling=0)}


def save_picture(image: "Image.Image", path: pathlib.Path, caption: str | None = None) -> None:
    """Writes a PNG or a JPEG completely or not at all; creates the folder if absent.

    Args:
      image: the image to write.
      path: the file; `.png` or `.jpg`.
      caption: metadata of a PNG.
    """
    from PIL.PngImagePlugin import PngInfo  # only here, so that a command's --help starts without PIL

    data, given = io.BytesIO(), dict(SAVING[path.suffix])
    if caption is not None:
        given["pnginfo"] = PngInfo()
        given["pnginfo"].add_itxt("caption", caption)
    image.save(data, **given)
    write_bytes(path, data.getvalue())
