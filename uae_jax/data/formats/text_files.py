"""A folder of images with one text file beside each, as kohya's scripts and SimpleTuner read it: a.jpg and a.txt."""

import pathlib

from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import FileRecords, ReadOptions, caption_texts

# text files that lie in folders and are no captions
OTHER_TEXTS = ("readme", "license", "licence", "notice", "requirements")


class TextFiles(FileRecords):
    """All images of a folder, at any depth, with the captions of `NAME.txt` beside `NAME.jpg`.

    Every line of a text file is a caption of its own.

    Raises:
      ValueError: no images, text that is not UTF-8, a text without an image, or two images that share one, or two texts
        of one image.
    """

    name = "text_files"
    title = "a folder of images with text files beside them"

    def __init__(self, listing: Listing, options: ReadOptions):
        super().__init__(listing.folder, options)
        texts: dict[pathlib.Path, pathlib.Path] = {}
        for file in caption_files(listing):
            if (other := texts.setdefault(file.with_suffix(""), file)) != file:
                raise ValueError(f"{file} and {other.name} are captions of one image: keep one of them")
        self.rows, used = [], {}
        for image in listing.images:
            text = texts.get(image.with_suffix(""))
            if text in used:
                raise ValueError(
                    f"{text} lies beside two images, {used[text].name} and {image.name}: rename or move one"
                )
            if text is not None:
                used[text] = image
            self.rows.append((listing.below(image), _lines(text) if text else ()))
        alone = next((text for text in texts.values() if text not in used), None)
        if alone is not None:
            raise ValueError(f"{alone} is a caption without an image beside it: add the image, or move the text away")
        if not self.rows:
            raise ValueError(f"{listing.folder} holds no images (such as .png, .jpg, .webp or .tif)")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: a text file that has an image beside it."""
        texts = caption_files(listing)
        images = {image.with_suffix("") for image in listing.images} if texts else set()
        return [listing.below(text) for text in texts if text.with_suffix("") in images][:1]

    def remedy(self, index: int) -> str:
        """The text file that is absent or empty."""
        return f"write a caption into {(self.folder / self.name_of(index)).with_suffix('.txt')}"


def caption_files(listing: Listing) -> list[pathlib.Path]:
    """The text files of a folder that may be captions."""
    return [file for file in listing.with_suffix(".txt") if file.stem.lower() not in OTHER_TEXTS]


def _lines(file: pathlib.Path) -> tuple[str, ...]:
    (text,) = caption_texts(file.read_bytes(), str(file)) or ("",)
    return tuple(line.strip() for line in text.splitlines() if line.strip())
