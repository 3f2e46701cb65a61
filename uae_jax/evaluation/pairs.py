"""Images of a folder, their references by the rules of Unified-Bench's `image_similarity.py`, and their captions."""

import dataclasses
import pathlib
from collections.abc import Sequence

from PIL import Image

from uae_jax.data.images import eight_bits, opened, walk_files
from uae_jax.files.json_files import read_records

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
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give a folder of images")
    files = sorted(str(path) for path in walk_files(folder) if path.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no images ({', '.join(SUFFIXES)})")
    return [pathlib.Path(file) for file in files]


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


def read_captions(path: str | pathlib.Path) -> dict[str, str]:
    """{image: caption} of lines {"image_id": ..., "caption": text}; "image" or "file_name" may replace "image_id".

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line without image or caption, a repeated image, or no lines.
    """
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(path), 1):
        file = record.get("image", record.get("file_name", ""))
        name = str(record.get("image_id", pathlib.PurePath(file).stem if isinstance(file, str) else ""))
        caption = record.get("caption")
        if not name or not isinstance(caption, str) or not caption.strip():
            raise ValueError(f'{path} record {number} needs {{"image_id": ..., "caption": text}}')
        if name in found:
            raise ValueError(f"{path} has two captions of image {name}; keep one")
        found[name] = caption.strip()
    if not found:
        raise ValueError(f"{path} holds no captions")
    return found


def image_files(folder: str | pathlib.Path, names: Sequence[str]) -> dict[str, pathlib.Path]:
    """{image: file}; the stem of a file is its image.

    Raises:
      FileNotFoundError: no such folder, or an image without a file in it.
    """
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give the folder of the images")
    files = {path.stem: path for path in walk_files(folder) if path.suffix.lower() in SUFFIXES}
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no image {missing[0]} ({len(missing)} of {len(names)} are missing); leave out --images "
            "to use the captions alone"
        )
    return {name: files[name] for name in names}
