"""Images of a folder, their references by the rules of Unified-Bench's `image_similarity.py`, and their captions."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from uae_jax.data.formats.records import CAPTION_FIELDS, chosen_caption, field_captions
from uae_jax.data.images import eight_bits, is_image_name, opened, walk_files
from uae_jax.files.json_files import read_objects
from uae_jax.files.paths import to_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tiff", ".webp")  # the official list
PREFIX = "recon_"
Pair = tuple[pathlib.Path, pathlib.Path]  # image, its reference


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Images and their references.

    Attributes:
      found: (image, reference) of each image that has a reference.
      unmatched: images without a reference, then references without an image.
      warnings: sentences for the reader of the scores.
    """

    found: tuple[tuple[pathlib.Path, pathlib.Path], ...]
    unmatched: tuple[tuple[pathlib.Path, str], ...]
    warnings: tuple[str, ...] = ()


def find_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """All images of a folder and its subfolders, sorted by path; hidden files are passed over, broken links are not.

    Raises:
      FileNotFoundError: no such folder, or no images.
    """
    folder = to_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give a folder of images")
    files = sorted(str(path) for path in walk_files(folder) if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no images ({', '.join(SUFFIXES)})")
    return [to_path(file) for file in files]


def unread_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Images that the benchmark ignores because of their extension, such as `.tif` and `.gif`."""
    others = set(Image.registered_extensions()) - set(SUFFIXES) - {".pdf", ".mpg", ".mpeg"}
    return [path for path in walk_files(folder) if path.suffix.lower() in others]


def match_images(images: Sequence[pathlib.Path], references: Sequence[pathlib.Path]) -> Pairs:
    """Finds each image's reference: the same file name, else the first with its stem or its stem after `recon_`.

    The official script keeps scores by file name and loses one of two images with the same name. Here, the later
    image is unmatched.

    Args:
      images: sorted by path.
      references: sorted by path.
    """
    names, stems = {}, {}
    for index, reference in enumerate(references):
        names.setdefault(reference.name, []).append(index)
        stems.setdefault(reference.stem, []).append(index)
    found, unmatched, warnings, used, seen = [], [], [], set(), {}
    for image in images:
        if image.name in seen:
            unmatched.append((image, f"another image has the same name: {seen[image.name]}"))
            continue
        seen[image.name] = image
        plain = stems.get(image.stem.removeprefix(PREFIX), []) if image.stem.startswith(PREFIX) else []
        candidates = names.get(image.name) or sorted({*stems.get(image.stem, []), *plain})
        if not candidates:
            unmatched.append((image, "no reference has its name"))
            continue
        if len(candidates) > 1:
            warnings.append(
                f"{image.name} matches {len(candidates)} references; compared with the first, "
                f"{references[candidates[0]]}"
            )
        found.append((image, references[candidates[0]]))
        used |= set(candidates)
    unmatched += [
        (reference, "no image is compared with it") for index, reference in enumerate(references) if index not in used
    ]
    return Pairs(tuple(found), tuple(unmatched), tuple(warnings))


def read_rgb(path: pathlib.Path) -> Image.Image:
    """Reads an image as the benchmark does: PIL's conversion to RGB drops transparency and ignores EXIF.

    Images of more than 8 bits, which PIL's conversion turns white, are scaled as everywhere.

    Raises:
      ValueError: the file is no image, damaged, or a broken link.
    """
    try:
        with opened(path) as image:
            return eight_bits(image).convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


class Captioned(NamedTuple):
    """One line of a file of captions: the caption, and the path of the image where the line gives it."""

    caption: str
    image: str | None


def read_captions(path: str | pathlib.Path) -> dict[str, Captioned]:
    """The captions of lines {"image_id" or "image" or "file_name": ..., "caption": text or list of texts}, by image.

    An image is called by its `image_id`, or else by the path that is given, with its suffix. Of several captions the
    one is taken that training takes: in turn by the number of the line.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not JSON, without image or caption, a repeated image, or no lines.
    """
    path = to_path(path)
    found: dict[str, Captioned] = {}
    remedy = "give lines such as " + '{"image": "a.jpg", "caption": "a cat"}'
    for number, record in enumerate(read_objects(path, {}, remedy)):
        where = f"{path} record {number + 1}"
        file = record.get("image", record.get("file_name"))
        name = record.get("image_id", file)
        texts = field_captions(record, CAPTION_FIELDS, where)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "" or not texts:
            raise ValueError(f'{where} needs {{"image_id": ..., "caption": text}}')
        if str(name) in found:
            raise ValueError(f"{path} has two captions of image {name}; keep one")
        given = file if isinstance(file, str) and file else None
        found[str(name)] = Captioned(chosen_caption(texts, number, "each") or "", given)
    return found


def renamed_alike(captions: dict[str, Captioned], others: Mapping[str, Captioned]) -> dict[str, Captioned]:
    """Captions under the names that another file has for the same images.

    One file may call an image `a` and the other `a.jpg`. A name that the other file lacks becomes the one name there
    of its stem, if exactly one name of each file has this stem.
    """
    ours, theirs = _by_stem(captions), _by_stem(others)
    names = {}
    for name in captions:
        stem = pathlib.PurePath(name).stem
        alone = len(ours[stem]) == 1 and len(theirs.get(stem, ())) == 1
        names[name] = theirs[stem][0] if name not in others and alone else name
    return {names[name]: captioned for name, captioned in captions.items()}


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(pathlib.PurePath(name).stem, []).append(name)
    return found


def image_files(folder: str | pathlib.Path, captions: Mapping[str, Captioned]) -> dict[str, pathlib.Path]:
    """The image file of each caption: the path that its line gives, or else the only image of its name or stem.

    Raises:
      FileNotFoundError: no such folder, or an image without a file in it.
      ValueError: an image that several files may be, none of which is the given path.
    """
    folder = to_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give the folder of the images")
    names: dict[str, list[pathlib.Path]] = {}
    for file in walk_files(folder):
        if is_image_name(file.name):
            for key in {file.name, file.stem, file.relative_to(folder).with_suffix("").as_posix()}:
                names.setdefault(key, []).append(file)
    found, missing = {}, []
    for name, captioned in captions.items():
        given = captioned.image or name
        places = [folder / given] if (folder / given).is_file() else names.get(pathlib.PurePath(given).name, [])
        places = places or ([] if captioned.image else names.get(name, []))
        if len(places) > 1:
            listed = " and ".join(file.relative_to(folder).as_posix() for file in places[:3])
            raise ValueError(f'{folder} has {listed} for image {name}; say which by "image": its path below the folder')
        if places:
            found[name] = places[0]
        else:
            missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{folder} has no image {missing[0]} ({len(missing)} of {len(captions)} are missing); leave out --images "
            "to use the captions alone"
        )
    return found
