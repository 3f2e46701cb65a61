"""Parquet files with image bytes and caption columns, as the Hub stores data sets of images."""

import collections
import pathlib
import threading
from typing import Any

import numpy as np

from uae_jax.data.formats.image_folder import METADATA
from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import CAPTION_FIELDS, ImageRecords, ReadOptions, field_captions
from uae_jax.data.images import read_content
from uae_jax.files.paths import ranges

KEPT = 2**30  # bytes of row groups in memory; those of the Hub hold 100 images each


class Parquet(ImageRecords):
    """The rows of all parquet files of a folder, read by row group.

    An image is a struct of `bytes` and `path`, or binary. Where the files belong to several splits by their names, only
    those of `options.split` are read.

    Raises:
      FileNotFoundError: no parquet files.
      ValueError: a damaged file, a file without the image column, or files of other columns.
    """

    name = "parquet"
    title = "a folder of parquet files with images"
    captions_at_hand = False

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        self.files = self.of_split(data_files(listing))
        if not self.files:
            raise FileNotFoundError(f"{listing.folder} has no parquet files")
        self.image, self.texts = "", ()
        self.names = [listing.below(file) for file in self.files]
        self.whole: list[bool] = []
        groups = []
        for number, file in enumerate(self.files):
            with _opened(file) as content:
                image, texts = _columns(file, content.schema_arrow, options)
                if number and (image, texts) != (self.image, self.texts):
                    raise ValueError(f"{file} has other columns than {self.files[0]}: give each its own folder")
                self.image, self.texts = image, texts
                sizes = [content.metadata.row_group(group).num_rows for group in range(content.num_row_groups)]
                groups += [(number, group, size) for group, size in enumerate(sizes)]
                self.whole.append(_has_all_bytes(content, image))
        self.groups = [(number, group) for number, group, _ in groups]
        self.starts = np.concatenate([[0], np.cumsum([size for *_, size in groups], dtype=np.int64)])
        firsts = {number: self.starts[at] for at, (number, _) in reversed([*enumerate(self.groups)])}
        self.first_rows = [int(firsts.get(number, 0)) for number in range(len(self.files))]
        self._kept: collections.OrderedDict[tuple[int, int, bool], Any] = collections.OrderedDict()
        self._lock = threading.Lock()
        if not len(self):
            raise ValueError(f"{self.files[0]} holds no rows")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: one file."""
        return [listing.below(file) for file in data_files(listing)[:1]]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name_of(self, index: int) -> str:
        """File and row, counted from 0 in the file."""
        number = self._number(index)
        return f"{self.names[number]} row {index - self.first_rows[number]}"

    def _number(self, index: int) -> int:
        """The number of the file that holds a row."""
        return self.groups[int(np.searchsorted(self.starts, index, "right")) - 1][0]

    def file_of(self, index: int) -> str:
        """The file with the row; empty where some of its rows name an image elsewhere."""
        number = self._number(index)
        return self.names[number] if self.whole[number] else ""

    def __getstate__(self) -> dict[str, Any]:
        """For a process that reads: it has row groups and a lock of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kept, self._lock = collections.OrderedDict(), threading.Lock()

    def _row(self, index: int, *, image: bool) -> dict[str, Any]:
        """The image, or the captions, of a row. One thread at a time reads a row group; the last few are kept."""
        at = int(np.searchsorted(self.starts, index, "right")) - 1
        key = (*self.groups[at], image)
        with self._lock:
            if key not in self._kept:
                with _opened(self.files[key[0]]) as content:
                    columns = [self.image] if image else list(self.texts)
                    try:
                        self._kept[key] = content.read_row_group(key[1], columns=columns)
                    except Exception as error:  # pyarrow's errors have no common base
                        place = f"{self.files[key[0]]} row group {key[1]}"
                        reason = " ".join(str(error).split())
                        raise ValueError(f"{place} cannot be read ({reason}): copy the file again") from error
                while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            table = self._kept[key]
        rows = table.slice(int(index - self.starts[at]), 1).to_pylist()
        if not rows:  # a damaged footer may promise more rows than the group has
            raise ValueError(f"{self.name_of(index)} is promised by its file and is not there: copy the file again")
        return rows[0]

    def encoded(self, index: int) -> bytes:
        """The bytes of the image column, or of the file that it names."""
        value = self._row(index, image=True)[self.image]
        if isinstance(value, dict):
            path = value.get("path")
            if value.get("bytes") is None and path:
                return read_content(self.files[self._number(index)].parent / path)
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise ValueError(f"{self.folder / self.name_of(index)} has no image in {self.image!r}: remove the row")
        return value

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts of the caption columns."""
        where = str(self.folder / self.name_of(index))
        return field_captions(self._row(index, image=False), self.texts, where) if self.texts else ()

    def remedy(self, index: int) -> str:
        """The column that is absent, or empty in this row."""
        if self.texts:
            return f"fill {' or '.join(self.texts)} of {self.folder / self.name_of(index)}, or remove the row"
        return f"name the column of captions in config.data.caption_key (looked for: {', '.join(CAPTION_FIELDS)})"


def data_files(listing: Listing) -> list[pathlib.Path]:
    """The parquet files of a folder that hold images, not tables about image files or tar shards beside them."""
    shards = {shard.with_suffix(".parquet") for shard in listing.with_suffix(".tar")}
    return [file for file in listing.with_suffix(".parquet") if file.name not in METADATA and file not in shards]


def _opened(file: pathlib.Path) -> Any:
    from pyarrow import parquet  # takes a while to import, needed only here

    try:
        return parquet.ParquetFile(ranges(file))
    except Exception as error:  # pyarrow's errors have no common base
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a whole parquet file ({reason}): copy it again") from error


def _has_all_bytes(content: Any, image: str) -> bool:
    """Whether no row can name an image elsewhere: the column has bytes alone.

    The counts in a file's footer would say more, but pyarrow reads beyond the end of a damaged one.
    """
    from pyarrow import types

    kind = content.schema_arrow.field(image).type
    return not types.is_struct(kind) or "path" not in {kind.field(i).name for i in range(kind.num_fields)}


def _columns(file: pathlib.Path, schema: Any, options: ReadOptions) -> tuple[str, tuple[str, ...]]:
    """The image column, that of the setting or the first of its kind, and the caption columns."""
    from pyarrow import types

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if holds_images(field.type)]
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} has two columns {twice!r}: write it with one of them")
    if options.image_key == "image" not in images and len(images) > 1:
        raise ValueError(
            f"{file} has several columns that may hold images, {', '.join(images)}: name one in config.data.image_key"
        )
    image = options.image_key if options.image_key in images else next(iter(images), "")
    if not image or options.image_key not in (image, "image"):
        raise ValueError(
            f"{file} has no image column {options.image_key!r}; its columns are {', '.join(schema.names)}: name one "
            "that holds the bytes of image files in config.data.image_key"
        )
    return image, tuple(name for name in options.caption_fields if name in schema.names)
