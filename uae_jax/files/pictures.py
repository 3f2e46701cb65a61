"""Pictures, written whole."""

import io
import pathlib
from typing import TYPE_CHECKING

from uae_jax.files.whole import write_bytes

if TYPE_CHECKING:
    from PIL import Image

SAVING = {".png": dict(format="PNG"), ".jpg": dict(format="JPEG", quality=95, subsampling=0)}


def save_picture(image: "Image.Image", path: pathlib.Path, caption: str | None = None) -> None:
    """Writes a PNG or a JPEG, whole or not at all, in a folder that is made if absent.

    Args:
      image: what to write.
      path: the file; `.png` or `.jpg`.
      caption: goes into the metadata of a PNG.
    """
    from PIL.PngImagePlugin import PngInfo  # a command's --help does not need it

    data, given = io.BytesIO(), dict(SAVING[path.suffix])
    if caption is not None:
        given["pnginfo"] = PngInfo()
        given["pnginfo"].add_itxt("caption", caption)
    image.save(data, **given)
    write_bytes(path, data.getvalue())
