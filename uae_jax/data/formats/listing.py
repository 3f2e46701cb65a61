"""The files of a folder, looked up once for finding out its format and for reading it."""

import dataclasses
import functools
import os
import pathlib

from uae_jax.data.images import is_image_name, walk_files
from uae_jax.files.paths import problem


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a folder, at any depth, without hidden ones.

    Attributes:
      folder: the folder; for a single file, that which holds it.
      files: sorted by path.
    """

    folder: pathlib.Path
    files: tuple[pathlib.Path, ...]

    @functools.cached_property
    def images(self) -> tuple[pathlib.Path, ...]:
        """Those with the suffix of an image."""
        return tuple(file for file in self.files if is_image_name(os.fspath(file)))

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The paths as text, for asking quickly whether one is there."""
        return frozenset(map(os.fspath, self.files))

    @functools.cached_property
    def _by_suffix(self) -> dict[str, list[pathlib.Path]]:
        found: dict[str, list[pathlib.Path]] = {}
        for file in self.files:
            found.setdefault(os.path.splitext(os.fspath(file))[1].lower(), []).append(file)
        return found

    def with_suffix(self, suffix: str) -> list[pathlib.Path]:
        """Those with this suffix, in any case."""
        return self._by_suffix.get(suffix, [])

    def below(self, file: pathlib.Path) -> str:
        """The path of a file below the folder, with slashes."""
        whole, top = os.fspath(file), os.path.join(os.fspath(self.folder), "")
        if os.sep == "/" and whole.startswith(top):  # a tenth of the time
            return whole[len(top) :]
        return file.relative_to(self.folder).as_posix()


def list_folder(folder: pathlib.Path) -> Listing:
    """The listing of a folder, or of a single file in its folder.

    Raises:
      FileNotFoundError: there is nothing of that name.
    """
    if folder.is_file():
        return Listing(folder.parent, (folder,))
    if not folder.is_dir():
        raise FileNotFoundError(problem(folder) or f"the data folder {folder} does not exist")
    return Listing(folder, tuple(walk_files(folder)))
