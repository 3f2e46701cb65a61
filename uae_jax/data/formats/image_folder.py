"""The Hub's image folder: metadata.jsonl, metadata.csv or metadata.parquet with `file_name` and captions."""

import csv
import io
import pathlib
from collections.abc import Iterator
from typing import Any

from uae_jax.data.formats.captions import check_present
from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import CAPTION_FIELDS, FileRecords, ReadOptions, field_captions
from uae_jax.files.json_files import json_objects

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class ImageFolder(FileRecords):
    """The rows of all metadata files of a folder; a file name is relative to the folder of its metadata file.

    Raises:
      FileNotFoundError: no metadata file, or no image of a row.
      ValueError: two metadata files in one folder, a broken row, or a row without a file name.
    """

    name = "image_folder"
    title = "an image folder of the Hub"

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        files = self.of_split([file for file in listing.files if file.name in METADATA])
        if not files:
            raise FileNotFoundError(f"{listing.folder} has no {', '.join(METADATA)}")
        self.rows, self.places, seen = [], [], {}
        for file in files:
            if file.parent in seen:
                raise ValueError(f"{file.parent} has both {seen[file.parent]} and {file.name}: keep one of them")
            seen[file.parent] = file.name
            for where, row in metadata_rows(file):
                name = row.get("file_name")
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{where} has no file_name: it has {', '.join(map(str, row)) or 'no fields'}")
                image = file.parent / name
                check_present(image, where, listing.names)
                captions = field_captions(row, options.caption_fields, where)
                self.rows.append((image.relative_to(listing.folder).as_posix(), captions))
                self.places.append(where)
        if not self.rows:
            raise ValueError(f"{files[0]} has no rows: write file_name and text of each image")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: its metadata files."""
        return [listing.below(file) for file in listing.files if file.name in METADATA][:1]

    def remedy(self, index: int) -> str:
        """The row that lacks a caption."""
        names = " or ".join(CAPTION_FIELDS[::2])
        return f"give {self.places[index]} a {names}, or name its field in config.data.caption_key"


def metadata_rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, fields) of every row of a metadata file.

    Raises:
      ValueError: the file cannot be read, or a row is broken; the message has its number.
    """
    if file.suffix == ".jsonl":
        yield from json_objects(file.read_bytes().split(b"\n"), file)
    elif file.suffix == ".csv":
        yield from _csv_rows(file)
    else:
        from pyarrow import parquet  # takes a while to import, needed only here

        try:
            rows = parquet.read_table(io.BytesIO(file.read_bytes())).to_pylist()
        except Exception as error:  # pyarrow's errors have no common base
            raise ValueError(f"{file} is not a readable parquet file ({error}): write it again") from error
        yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        names = reader.fieldnames or ()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{file} has two columns {twice!r}: keep one of them")
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where} does not have the {len(names)} fields of the first line")
            yield where, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8 ({error}): correct it") from error
