"""A package of a few drawn pictures, in the form of the packages that the emoji come from."""

import hashlib
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image, ImageDraw

from uae_jax.data import emoji_files

# name, character, colour; the last ones are not to be taken
DRAWN = [
    ("dog", "\U0001f415", "brown"),
    ("cat", "\U0001f408", "orange"),
    ("red apple", "\U0001f34e", "red"),
    ("fish", "\U0001f41f", "blue"),
    ("green apple", "\U0001f34f", "green"),
    ("dove", "\U0001f54a\ufe0f", "white"),
    ("top hat", "\U0001f3a9", "black"),
    ("hot dog", "\U0001f32d", "yellow"),
]
TAKEN = [name for name, _, _ in DRAWN[:6]]


def picture(number: int, colour: str) -> bytes:
    """A different figure for each number, with a transparent margin."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen, rng = ImageDraw.Draw(image), np.random.default_rng(number)
    pen.ellipse((6, 8, 56, 54), fill=colour)
    for _ in range(4):
        x, y = rng.integers(10, 44, 2)
        pen.rectangle((x, y, x + 9, y + 9), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    stored = io.BytesIO()
    image.save(stored, "WEBP", lossless=True)
    return stored.getvalue()


def write_tar(path: pathlib.Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_archives(folder: pathlib.Path) -> None:
    """Both archives, under the names of the real ones."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        f"package/assets/{character.replace(chr(0xFE0F), '').encode('utf-32-be').hex().lstrip('0')}.webp": picture(
            number, colour
        )
        for number, (_, character, colour) in enumerate(DRAWN)
    }
    write_tar(folder / emoji_files.PICTURE_ARCHIVE.file, pictures)
    names = {character: {"name": name, "group": "Food & Drink"} for name, character, _ in DRAWN}
    write_tar(folder / emoji_files.NAME_ARCHIVE.file, {"package/data-by-emoji.json": json.dumps(names).encode()})


def pin(folder: pathlib.Path, patch) -> None:
    """Lets the archives of a folder count as the real ones: patches their checksums."""
    for name in ("PICTURE_ARCHIVE", "NAME_ARCHIVE"):
        archive = getattr(emoji_files, name)
        patch.setitem(archive.__dict__, "sha256", hashlib.sha256((folder / archive.file).read_bytes()).hexdigest())


def write_emoji(folder: pathlib.Path, patch, count: int = len(TAKEN)) -> pathlib.Path:
    """A folder as `uae_jax.fetch_emoji` leaves it."""
    write_archives(folder / "packages")
    pin(folder / "packages", patch)
    emoji_files.write_folder(folder, folder / "packages", count)
    return folder
