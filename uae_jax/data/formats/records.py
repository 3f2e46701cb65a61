"""What every format of images has: a length, and for each number a name, an encoded image and its captions."""

import abc
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from uae_jax.data.images import decode_image, decode_square, measure_image, read_content
from uae_jax.data.sources import Example

# words of file names that say which part of a data set a file is of
SPLITS = ("train", "validation", "val", "test")
CAPTION_CHOICES = ("each", "longest", "shortest")
# fields that hold captions, where no setting names one
CAPTION_FIELDS = ("caption", "captions", "text", "texts")


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How records are read.

    Attributes:
      image_key, caption_key: field of the image, and fields of the captions, separated by commas. Where the records
        lack the usual name ("image", "caption"), the format looks for another.
      caption_choice: which of several captions: "each" (example i gets number i modulo n), "longest" or "shortest".
      split: of several splits in one folder, such as `train-00000-of-00002.parquet`; not of loose images.
      side: images are read as squares of so many pixels (`images.decode_square`); 0 for whole ones of their own size.
      scaled: whether JPEGs are decoded at a fraction of their size, where that is enough.
    """

    image_key: str = "image"
    caption_key: str = "caption"
    caption_choice: str = "each"
    split: str = "train"
    side: int = 0
    scaled: bool = True

    @property
    def caption_fields(self) -> tuple[str, ...]:
        """The fields that may hold captions: those of the setting, or the usual ones."""
        named = tuple(part.strip() for part in self.caption_key.split(",") if part.strip())
        return named if named not in ((), ("caption",)) else CAPTION_FIELDS


class ImageRecords(abc.ABC):
    """Images of one folder by number, and their captions; the same number always gives the same example.

    Attributes:
      name, title: of the format, in settings and in words; the title of an object also names the split that is read.
      captions_at_hand: whether all captions are known without reading images.
    """

    name: ClassVar[str]
    title: str
    captions_at_hand: ClassVar[bool] = True

    def __init__(self, folder: pathlib.Path, options: ReadOptions):
        self.folder, self.options = folder, options

    def of_split(self, files: list[pathlib.Path]) -> list[pathlib.Path]:
        """The files of `options.split`, where their names or those of their folders tell several splits; else all.

        Raises:
          ValueError: several splits, and none of that name.
        """
        split = self.options.split

        def split_of(file: pathlib.Path) -> str:
            words = re.split("[-_]", file.name.partition(".")[0]) + [file.parent.name]
            return next((word for word in words if word in SPLITS or word == split), "")

        splits = {split_of(file) for file in files} - {""}
        if len(splits) < 2:
            return files
        if split not in splits:
            known = ", ".join(sorted(splits))
            raise ValueError(f"{self.folder} has the splits {known}, not {split!r}: set config.data.split to one")
        self.title = f"{self.title}, split {split}"
        return [file for file in files if split_of(file) in ("", split)]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def name_of(self, index: int) -> str:
        """The record's name below the folder: a file, or a file with a row or key."""

    @abc.abstractmethod
    def file_of(self, index: int) -> str:
        """The file below the folder that holds image and captions: while it is the same, the record is.

        Empty where a part of the record lies elsewhere.
        """

    @property
    def scope(self) -> str:
        """What the verdict on a record depends on beside its file."""
        return f"{self.name} {self.options.image_key} {self.options.caption_key}"

    @abc.abstractmethod
    def encoded(self, index: int) -> bytes:
        """The content of the image's file.

        Raises:
          ValueError, OSError: it cannot be read; the message names file and row.
        """

    @abc.abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """Its captions, without space around them; none where it has none."""

    def remedy(self, index: int) -> str:
        """Where a caption of this record would have to be written."""
        return f"give {self.folder / self.name_of(index)} a caption"

    def example(self, index: int, captions: Sequence[str]) -> Example:
        """The example of a record with given captions; errors of `encoded` and `decoded`."""
        caption = chosen_caption(captions, index, self.options.caption_choice)
        return Example(self.decoded(index, self.encoded(index)), caption, self.name_of(index))

    def decoded(self, index: int, content: bytes) -> np.ndarray:
        """The image of a record's content, uint8 [H, W, 3]; errors of `images.decode_image`."""
        where, side = str(self.folder / self.name_of(index)), self.options.side
        return decode_square(content, where, side, scaled=self.options.scaled) if side else decode_image(content, where)

    def measured(self, index: int, content: bytes) -> tuple[int, int]:
        """(height, width) of a record's content, which is decoded; errors of `images.measure_image`."""
        return measure_image(content, str(self.folder / self.name_of(index)))

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        return self.example(index, self.captions(index))


class FileRecords(ImageRecords):
    """Records whose images are files.

    Attributes:
      rows: (path of the image below the folder, captions) of each record.
    """

    rows: list[tuple[str, tuple[str, ...]]]

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        """The path of the image below the folder."""
        return self.rows[index][0]

    def file_of(self, index: int) -> str:
        """The image itself."""
        return self.rows[index][0]

    @property
    def scope(self) -> str:
        """All formats share the verdicts: captions were read when the folder was opened."""
        return "files"

    def encoded(self, index: int) -> bytes:
        """The content of the file."""
        return read_content(self.folder / self.rows[index][0])

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the row."""
        return self.rows[index][1]


def chosen_caption(captions: Sequence[str], index: int, choice: str) -> str | None:
    """One of a record's captions: number `index` modulo n, the longest or the shortest; None of none."""
    if not captions:
        return None
    if choice == "each":
        return captions[index % len(captions)]
    return (max if choice == "longest" else min)(captions, key=len)


def caption_texts(value: Any, where: str) -> tuple[str, ...]:
    """The captions of a field: text, bytes in UTF-8, or a list of them; empty ones and None are left out.

    Raises:
      ValueError: another kind of value, or text in another encoding.
    """
    if value is None:
        return ()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} holds a caption that is not UTF-8 ({error}): write it in UTF-8") from error
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError(f"{where} holds a caption with half a character (a lone surrogate): correct it")
        return (value.strip(),) if value.strip() else ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} holds a caption of type {type(value).__name__}: give a text, or a list of texts")
    return tuple(text for item in value for text in caption_texts(item, where))


def field_captions(row: Any, fields: Iterable[str], where: str) -> tuple[str, ...]:
    """The captions of all of these fields of a mapping, in order; errors of `caption_texts`."""
    return tuple(text for field in fields for text in caption_texts(row.get(field), where))
