"""The formats of a data folder: which one a folder has, and its records.

A format is a class of `records.ImageRecords` in a file of its own, with `found`, which says what in a folder is of it.
"""

import pathlib

from uae_jax.data.formats.array_record import ArrayRecord
from uae_jax.data.formats.captions import CAPTION_FILE, Captions
from uae_jax.data.formats.coco import Coco
from uae_jax.data.formats.image_folder import ImageFolder
from uae_jax.data.formats.images import Images
from uae_jax.data.formats.listing import Listing, list_folder
from uae_jax.data.formats.parquet import Parquet
from uae_jax.data.formats.records import CAPTION_CHOICES, ImageRecords, ReadOptions
from uae_jax.data.formats.text_files import TextFiles
from uae_jax.data.formats.webdataset import Webdataset
from uae_jax.files.paths import to_path

KINDS = (Captions, ImageFolder, TextFiles, Coco, Parquet, Webdataset, ArrayRecord, Images)
FORMATS = {kind.name: kind for kind in KINDS}
# formats that hold the images themselves: loose images beside them are a second format
CONTAINERS = ("parquet", "webdataset", "array_record")

__all__ = ["CAPTION_CHOICES", "FORMATS", "ImageRecords", "ReadOptions", "detect", "open_records"]


def detect(listing: Listing) -> str:
    """The name of the format that a folder has.

    Raises:
      ValueError: none, two at once, or captions in a folder below.
    """
    marks = {name: kind.found(listing) for name, kind in FORMATS.items()}
    found = [name for name, files in marks.items() if files]
    if found and not set(found) <= {"images", *CONTAINERS}:
        found = [name for name in found if name != "images"]  # the other one says what the images are
    if not found:
        raise ValueError(
            f"{listing.folder} holds no images in any of the formats {', '.join(FORMATS)}; docs/data.md shows what "
            "each looks like"
        )
    deeper = [file for file in listing.with_suffix(".jsonl") if file.name == CAPTION_FILE]
    if found == ["images"] and deeper:
        raise ValueError(
            f"{listing.folder} has no {CAPTION_FILE}, but {deeper[0].parent} has one: give that folder, or several as "
            "config.data.mixture; config.data.format=images reads the images without captions"
        )
    if len(found) > 1:
        first, second = found[:2]
        raise ValueError(
            f"{listing.folder} is two formats at once, {first} ({marks[first][0]}) and {second} ({marks[second][0]}): "
            f"move one away, or set config.data.format to {first} or {second}"
        )
    return found[0]


def open_records(folder: str | pathlib.Path, options: ReadOptions, name: str = "") -> ImageRecords:
    """The records of a folder, or of a single file such as COCO's JSON.

    Args:
      folder: the folder.
      options: how records are read.
      name: of the format; empty to find it out.

    Raises:
      FileNotFoundError, ValueError: no such folder, no format or two, or what the format refuses.
    """
    listing = list_folder(to_path(folder))
    return FORMATS[name or detect(listing)](listing, options)
