"""The files of a folder, looked up once for finding out its format and for reading it."""

import dataclasses
import functools
import pathlib

from uae_jax.data.images import is_image_name, walk_files


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
        return tuple(file for file in self.files if is_image_name(file.name))

    def with_suffix(self, *suffixes: str) -> list[pathlib.Path]:
        """Those with one of these suffixes, in any case."""
        return [file for file in self.files if file.suffix.lower() in suffixes]

    def below(self, file: pathlib.Path) -> str:
        """The path of a file below the folder, with slashes."""
        return file.relative_to(self.folder).as_posix()


def list_folder(folder: pathlib.Path) -> Listing:
    """The listing of a folder, or of a single file in its folder.

    Raises:
      FileNotFoundError: there is nothing of that name.
    """
    if folder.is_file():
        return Listing(folder.parent, (folder,))
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    return Listing(folder, tuple(walk_files(folder)))
