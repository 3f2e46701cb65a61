"""Which picture belongs to which reference, by the rules of Unified-Bench's official `image_similarity.py`."""

import dataclasses
import pathlib
from collections.abc import Sequence

from PIL import Image

from uae_jax.files.json_files import read_records

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tiff", ".webp")  # the official list
PREFIX = "recon_"
Pair = tuple[pathlib.Path, pathlib.Path]  # image, its reference


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures and their references.

    Attributes:
      found: (picture, its reference), one for each picture that has one.
      unmatched: pictures without a reference, then references without a picture.
      warnings: what a reader of the scores should know, in sentences.
    """

    found: tuple[tuple[pathlib.Path, pathlib.Path], ...]
    unmatched: tuple[tuple[pathlib.Path, str], ...]
    warnings: tuple[str, ...] = ()


def find_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """All images in a folder and its subfolders, in the order of their paths.

    Raises:
      FileNotFoundError: no such folder, or no image in it.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give a folder of images")
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"folder {folder} holds no images ({', '.join(SUFFIXES)})")
    return [pathlib.Path(file) for file in files]


def unread_images(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Images that the benchmark passes over because of their extension, such as `.tif` and `.gif`."""
    others = set(Image.registered_extensions()) - set(SUFFIXES) - {".pdf", ".mpg", ".mpeg"}
    return sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in others and path.is_file())


def match_images(pictures: Sequence[pathlib.Path], references: Sequence[pathlib.Path]) -> Pairs:
    """Finds each picture's reference: the same file name, else the same stem or the stem after `recon_`, the first by
    path.

    The official script keeps scores by file name; of two pictures of one name it would lose one. Here the later ones
    are unmatched.

    Args:
      pictures: in the order of their paths.
      references: in the order of their paths.
    """
    names, stems = {}, {}
    for index, reference in enumerate(references):
        names.setdefault(reference.name, []).append(index)
        stems.setdefault(reference.stem, []).append(index)
    found, unmatched, warnings, used, seen = [], [], [], set(), {}
    for picture in pictures:
        if picture.name in seen:
            unmatched.append((picture, f"another picture has the same name: {seen[picture.name]}"))
            continue
        seen[picture.name] = picture
        plain = stems.get(picture.stem.removeprefix(PREFIX), []) if picture.stem.startswith(PREFIX) else []
        candidates = names.get(picture.name) or sorted({*stems.get(picture.stem, []), *plain})
        if not candidates:
            unmatched.append((picture, "no reference has its name"))
            continue
        if len(candidates) > 1:
            warnings.append(
                f"{picture.name} fits {len(candidates)} references; compared with the first, "
                f"{references[candidates[0]]}"
            )
        found.append((picture, references[candidates[0]]))
        used |= set(candidates)
    unmatched += [
        (reference, "no picture is compared with it") for index, reference in enumerate(references) if index not in used
    ]
    return Pairs(tuple(found), tuple(unmatched), tuple(warnings))


def read_rgb(path: pathlib.Path) -> Image.Image:
    """An image as the benchmark reads it: PIL's plain conversion to RGB, which drops transparency and ignores EXIF.

    Raises:
      ValueError: it is not an image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error})") from error


def read_captions(path: str | pathlib.Path) -> dict[str, str]:
    """Captions by image: lines {"image_id" (or "image", "file_name", whose stem it is): ..., "caption": text}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line without image or caption, an image twice, or no line at all.
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
    """The file of each image, by its stem.

    Raises:
      FileNotFoundError: no such folder, or an image without a file in it.
    """
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give the folder of the images")
    files = {path.stem: path for path in sorted(pathlib.Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES}
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no image {missing[0]} ({len(missing)} of {len(names)} are missing); leave out --images to "
            "judge by text alone"
        )
    return {name: files[name] for name in names}
