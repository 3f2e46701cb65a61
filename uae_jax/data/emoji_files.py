"""Source archives of the emoji, their checks, and the choice of emoji for a folder of `emoji.EmojiSet`.

Images: Fluent emoji, 3-D style, 256 pixels, WebP with transparency (Microsoft; MIT licence). Names: the CLDR short
names of Unicode (MIT package of Unicode data files).
"""

import dataclasses
import hashlib
import json
import pathlib
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from uae_jax.data.emoji import COLOURS, INDEX_FILE, cropped, scaled
from uae_jax.data.scene_captions import GRAMMAR_WORDS
from uae_jax.files.json_files import write_json

GROUPS = ("Animals & Nature", "Food & Drink")
FIRST_WORDS = ("red", "green", "black", "white", "brown")
PICTURES = "pictures"
# images are compared at this width in pixels on gray, about the size of a small emoji in an image of 64 pixels
_COMPARED = 24


@dataclasses.dataclass(frozen=True)
class Archive:
    """A package of the npm registry as stored by `npm pack`: pinned version, checksum of the file, licence."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    licence: str


PICTURE_ARCHIVE = Archive(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    15.8,
    "MIT",
)
NAME_ARCHIVE = Archive(
    "unicode-emoji-json",
    "0.9.0",
    "unicode-emoji-json-0.9.0.tgz",
    "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    0.1,
    "MIT",
)
ARCHIVES = (PICTURE_ARCHIVE, NAME_ARCHIVE)


def check_archive(path: pathlib.Path, archive: Archive) -> None:
    """Raises ValueError for a file that is not the pinned archive; the message has the file."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(
            f"{path} has the checksum {found}, but {archive.package} {archive.version} has {archive.sha256}: "
            "remove the file and fetch it again"
        )


def _members(path: pathlib.Path, folder: str, suffix: str) -> dict[str, bytes]:
    """The files below a folder of an archive by name."""
    with tarfile.open(path) as archive:
        return {
            pathlib.PurePosixPath(member.name).name: stream.read()
            for member in archive
            if member.isfile()
            and member.name.startswith(folder)
            and member.name.endswith(suffix)
            and (stream := archive.extractfile(member))
        }


def short_name(name: str) -> bool:
    """Whether a name is one lower-case word of letters, or a colour and such a word, without words of the grammar."""
    words = name.split()
    return all(
        word.isascii() and word.isalpha() and word.islower() and word not in GRAMMAR_WORDS for word in words
    ) and (len(words) == 1 and name not in COLOURS or len(words) == 2 and words[0] in FIRST_WORDS)


def candidates(names: dict[str, Any], pictures: dict[str, bytes]) -> list[tuple[str, str]]:
    """(name, image file) of everything with a short name in `GROUPS` and an image, in Unicode's order."""
    found = []
    for character, row in names.items():
        code = "-".join(f"{ord(point):04x}" for point in character)
        file = next((f"{code}.webp" for code in (code, code.replace("-fe0f", "")) if f"{code}.webp" in pictures), None)
        if file and row["group"] in GROUPS and short_name(row["name"]):
            found.append((row["name"], file))
    return found


def most_different(pictures: Sequence[bytes], count: int) -> list[int]:
    """Indices of `count` images: the later image of the most similar pair is dropped until `count` are left."""
    looks = np.stack([_look(picture) for picture in pictures])
    square = (looks * looks).sum(-1)
    distances = square[:, None] + square[None] - 2 * looks @ looks.T
    distances[np.tril_indices(len(looks))] = np.inf
    kept = list(range(len(looks)))
    while len(kept) > count:
        later = int(distances.argmin()) % len(looks)
        distances[later] = distances[:, later] = np.inf
        kept.remove(later)
    return kept


def _look(content: bytes) -> np.ndarray:
    image, ground = scaled(cropped(content), _COMPARED), Image.new("RGBA", (_COMPARED, _COMPARED), (128, 128, 128, 255))
    ground.alpha_composite(image, ((_COMPARED - image.width) // 2, (_COMPARED - image.height) // 2))
    return np.asarray(ground.convert("RGB"), np.float64).ravel()


def write_folder(folder: pathlib.Path, archives: pathlib.Path, count: int) -> list[str]:
    """Extracts the emoji from the two archives in the folder `archives`, and returns their names.

    The index is written last, so that a folder with an index is complete.

    Raises:
      ValueError: an archive has another checksum, or fewer emoji than `count`.
    """
    for archive in ARCHIVES:
        check_archive(archives / archive.file, archive)
    names = json.loads(_members(archives / NAME_ARCHIVE.file, "package/", "data-by-emoji.json")["data-by-emoji.json"])
    pictures = _members(archives / PICTURE_ARCHIVE.file, "package/assets/", ".webp")
    found = candidates(names, pictures)
    if count < 1 or len(found) < count:
        raise ValueError(f"there are {len(found)} emoji with short names: {count} cannot be taken")
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in most_different([pictures[file] for _, file in found], count):
        name, file = found[index]
        (folder / PICTURES / file).write_bytes(pictures[file])
        rows.append({"name": name, "file": f"{PICTURES}/{file}", "sha256": hashlib.sha256(pictures[file]).hexdigest()})
    listed = {"packages": [dataclasses.asdict(archive) for archive in ARCHIVES], "emoji": rows}
    write_json(folder / INDEX_FILE, listed)
    return [row["name"] for row in rows]
