"""array_record files of tf.train.Example messages with image bytes and captions, read without TensorFlow."""

import bisect
import pathlib
from typing import Any

from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.record_files import record_file
from uae_jax.data.formats.records import CAPTION_FIELDS, ImageRecords, ReadOptions, caption_texts
from uae_jax.data.formats.tf_example import bytes_features

IMAGE_FIELDS = ("image", "image/encoded", "image_bytes", "jpg", "jpeg", "png")
# captions as TFDS flattens them
NESTED = ("captions/text", "caption/text")


class ArrayRecord(ImageRecords):
    """The records of all files of a folder.

    Raises:
      FileNotFoundError: no such files.
      ValueError: a file that is damaged or cut short, or records without an image.
    """

    name = "array_record"
    title = "a folder of array_record files"
    captions_at_hand = False

    def __init__(self, listing: Listing, options: ReadOptions):
        from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow, needed only here

        super().__init__(listing.folder, options)
        self.files = self.of_split(record_files(listing))
        if not self.files:
            raise FileNotFoundError(f"{listing.folder} has no array_record files")
        self.names = [listing.below(file) for file in self.files]
        self.starts = [0]
        for file in self.files:  # one by one: the error of all together names none of them
            try:
                self.starts.append(self.starts[-1] + len(ArrayRecordDataSource(record_file(file))))
            except Exception as error:  # the reader's C++ errors have no common base
                reason = " ".join(str(error).split())
                raise ValueError(f"{file} is not a whole array_record file ({reason}): copy it again") from error
        self.data: Any = ArrayRecordDataSource([record_file(file) for file in self.files])
        if not self.starts[-1]:
            raise ValueError(f"{self.files[0]} holds no records")
        first = self._features(0)
        names = IMAGE_FIELDS if options.image_key == "image" else (options.image_key,)
        self.image = next((name for name in names if name in first), "")
        if not self.image:
            raise ValueError(
                f"{self.folder / self.name_of(0)} has no image {options.image_key!r}; its features are "
                f"{', '.join(sorted(first))}: name one that holds the bytes of image files in config.data.image_key"
            )

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: one file."""
        return [listing.below(file) for file in record_files(listing)[:1]]

    def __len__(self) -> int:
        return self.starts[-1]

    def name_of(self, index: int) -> str:
        """File and record, counted from 0 in the file."""
        number = self._number(index)
        return f"{self.names[number]} record {index - self.starts[number]}"

    def _number(self, index: int) -> int:
        """The number of the file that holds a record."""
        return bisect.bisect_right(self.starts, index) - 1

    def file_of(self, index: int) -> str:
        """The file with the record."""
        return self.names[self._number(index)]

    def _features(self, index: int) -> dict[str, list[bytes]]:
        where = self.folder / self.name_of(index)
        try:
            return bytes_features(self.data[index])
        except Exception as error:  # a damaged chunk raises the reader's own errors
            reason = " ".join(str(error).split())
            raise ValueError(f"{where} cannot be read ({reason}): write the file again") from error

    def encoded(self, index: int) -> bytes:
        """The first value of the image's feature."""
        values = self._features(index).get(self.image)
        if not values:
            raise ValueError(f"{self.folder / self.name_of(index)} has no image in {self.image!r}: remove the record")
        return values[0]

    def captions(self, index: int) -> tuple[str, ...]:
        """All values of the captions' features."""
        features, where = self._features(index), str(self.folder / self.name_of(index))
        names = (*self.options.caption_fields, *NESTED)
        return tuple(text for name in names for text in caption_texts(features.get(name), where))

    def remedy(self, index: int) -> str:
        """The feature that is absent or empty."""
        return f"write a feature {CAPTION_FIELDS[0]!r}, or name that of the captions in config.data.caption_key"


def record_files(listing: Listing) -> list[pathlib.Path]:
    """The files of a folder with array_record in their suffix, such as `a.array_record-00000-of-00002`."""
    files = (file for file in listing.files if ".array" in file.name)
    return [file for file in files if any(end.startswith(".array") for end in file.suffixes)]
