"""COCO captions: a JSON file with `images` and `annotations`, and a folder with the images."""

import json
import os
import pathlib
from typing import Any

from uae_jax.data.formats.captions import check_present
from uae_jax.data.formats.listing import Listing
from uae_jax.data.formats.records import FileRecords, ReadOptions, caption_texts
from uae_jax.files.paths import is_url


class Coco(FileRecords):
    """The images of one JSON file in its order, each with all of its captions.

    The images lie beside the JSON file, in the folder, or in a subfolder such as `train2017` or `images/train2017`.

    Raises:
      FileNotFoundError: no such JSON file, or no image of a caption.
      ValueError: several of them, broken JSON, or a caption of an unknown image; the message has its number.
    """

    name = "coco"
    title = "a folder of images with COCO captions"

    def __init__(self, listing: Listing, options: ReadOptions):
        files = caption_jsons(listing)
        if not files:
            raise FileNotFoundError(f"{listing.folder} has no JSON file of COCO captions (images and annotations)")
        if len(files) > 1:
            raise ValueError(
                f"{listing.folder} has two files of captions, {listing.below(files[0])} and "
                f"{listing.below(files[1])}: name one of them as config.data.folder"
            )
        (self.file,) = files
        images, captions = _read(self.file)
        folder = _image_folder(listing, self.file, next(iter(images.values()), ""))
        super().__init__(folder, options)
        self.rows = [(name, tuple(captions.get(number, ()))) for number, name in images.items()]
        for number, name in images.items():
            check_present(os.path.join(folder, name), f"{self.file} (image {number})", listing.names)
        if not self.rows:
            raise ValueError(f"{self.file} lists no images")

    @staticmethod
    def found(listing: Listing) -> list[str]:
        """What in the folder is of this format: JSON files of captions."""
        return [listing.below(file) for file in caption_jsons(listing)[:1]]

    def remedy(self, index: int) -> str:
        """The file that lacks an annotation."""
        return f"add an annotation of {self.name_of(index)} to {self.file}, or remove it from its images"


def caption_jsons(listing: Listing) -> list[pathlib.Path]:
    """The JSON files that hold images and captions, by a look at their bytes; one beside an image is about it alone."""
    needed = (b'"images"', b'"annotations"', b'"caption"', b'"image_id"')
    if not listing.with_suffix(".json"):
        return []
    about = {image.with_suffix("") for image in listing.images}
    files = [file for file in listing.with_suffix(".json") if file.with_suffix("") not in about and file.is_file()]
    contents = ((file, file.read_bytes()) for file in files)
    return [file for file, content in contents if all(word in content for word in needed)]


def _read(file: pathlib.Path) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """{image: file name} and {image: captions}."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
        listed = [(image["id"], str(image["file_name"])) for image in content["images"]]
        images = dict(listed)
        annotations = list(content["annotations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a file of COCO captions ({error!r}): copy it again") from error
    for number, name in listed:
        if images[number] != name:
            raise ValueError(f"{file} has the id {number!r} twice, for {name} and {images[number]}: give each its own")
    captions: dict[Any, list[str]] = {}
    for number, annotation in enumerate(annotations, 1):
        where = f"{file} annotation {number}"
        image = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(image, str | int | float) or image not in images:
            raise ValueError(f"{where} is a caption of an image that the file does not list: add it, or remove this")
        captions.setdefault(image, []).extend(caption_texts(annotation.get("caption"), where))
    return images, captions


def _image_folder(listing: Listing, file: pathlib.Path, first: str) -> pathlib.Path:
    """The folder below which the first image has its name: that of the file, the whole, or a subfolder."""
    above = file.parent if is_url(file) else file.parent.parent  # a bucket has no folder above it
    tops = dict.fromkeys([file.parent, listing.folder, above])
    inside = [place for top in tops for place in sorted(top.iterdir()) if place.is_dir()]
    # captions_train2017.json belongs to train2017, also where val2017 has an image of the same name
    inside.sort(key=lambda place: place.name not in file.stem.split("_"))
    found = next((place for place in (*tops, *inside) if (place / first).is_file()), None)
    deeper = (image for image in listing.images if image.as_posix().endswith(f"/{first}"))
    return found or next((image.parents[len(pathlib.PurePath(first).parts) - 1] for image in deeper), listing.folder)
