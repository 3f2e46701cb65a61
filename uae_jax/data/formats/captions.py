"""A folder of images with captions.jsonl; each line is {"file_name" or "image": ..., "caption": text or texts}."""

import os
from collections.abc import Collection

from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import FileRecords, ReadOptions, field_captions
from uae_jax.files.json_files import json_objects
from uae_jax.files.paths import to_path

CAPTION_FILE = "captions.jsonl"


class Captions(FileRecords):
    """The lines of captions.jsonl; file names are relative to the folder.

    Raises:
      FileNotFoundError: no captions.jsonl, or no image of a line.
      ValueError: a broken line, or one without image or caption; the message has its number.
    """

    name = "captions"
    title = "a folder of images with captions.jsonl"

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        self.file = listing.folder / CAPTION_FILE
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} does not exist: a data folder needs it beside its images")
        self.rows, top = [], os.fspath(listing.folder)
        for where, row in json_objects(self.file.read_bytes().split(b"\n"), self.file):
            name = row.get("file_name", row.get("image"))
            if not isinstance(name, str) or not name:
                raise ValueError(f'{where} names no image: write {{"file_name": ..., "caption": ...}}')
            captions = field_captions(row, options.caption_fields, where)
            if not captions:
                raise ValueError(f'{where} has no caption: give "caption" a text, or a list of texts')
            check_present(os.path.join(top, name), where, listing.names)
            self.rows.append((name, captions))
        if not self.rows:
            raise ValueError(f"{self.file} holds no captions: write one JSON object a line")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: the file of captions."""
        return [CAPTION_FILE] if os.fspath(listing.folder / CAPTION_FILE) in listing.names else []


def check_present(file: str | os.PathLike[str], where: str, present: Collection[str]) -> None:
    """Raises FileNotFoundError for an image that a row names and that does not exist; `present` are known to exist."""
    if os.fspath(file) not in present and not to_path(file).is_file():
        raise FileNotFoundError(
            f"image {file} does not exist, but {where} has a caption for it: add the image, or remove the row"
        )
