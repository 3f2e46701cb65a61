"""A path that a person names: of a local folder, or the URL of a bucket, `gs://...` or `s3://...`.

`to_path` is the only way from a name to a path: `pathlib.Path` would make one slash of the two in a URL. What it
returns has the methods of `pathlib.Path` either way. Libraries that need local files get them by `local_to_read`,
`local_to_write` and `local_copies`.
"""

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, cast

# what each URL needs, by the name of fsspec's file system
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
SEPARATOR = "://"
SMALL = 2**26  # bytes


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name or path is of a bucket."""
    return SEPARATOR in os.fspath(name)


def to_path(name: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a name, local or of a bucket; a path stays what it is. No bucket is asked here.

    Raises:
      ValueError: a URL of another kind, or without a bucket.
    """
    if isinstance(name, pathlib.PurePath):
        return cast(pathlib.Path, name)
    text = os.fspath(name)
    if not is_url(text):
        return pathlib.Path(text)
    scheme, _, rest = text.partition(SEPARATOR)
    if scheme not in PACKAGES:
        known = " and ".join(f"{scheme}{SEPARATOR}" for scheme in PACKAGES)
        raise ValueError(f"{text} is no URL that can be read: {known} can; copy the files, or mount their store")
    if not rest.strip("/"):
        raise ValueError(f"{text} names no bucket: write {scheme}://BUCKET/FOLDER")
    from uae_jax.files.buckets import BucketPath  # fsspec, needed for URLs only

    return cast(pathlib.Path, BucketPath(text))


def real(name: str | os.PathLike[str]) -> str:
    """The name without links and dots, the same for every way to name a local folder; a URL stays."""
    text = os.fspath(name)
    return text.rstrip("/") if is_url(text) else os.path.realpath(text)


def read_range(path: pathlib.Path, start: int, size: int) -> bytes:
    """`size` bytes of a file from `start`, fewer at its end; of a bucket by one request for them alone."""
    if is_url(path):
        return cast(Any, path).read_range(start, size)
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def ranges(path: pathlib.Path) -> Any:
    """What a reader of parts of a file takes: the path, or of a bucket a file that asks for those parts alone."""
    return cast(Any, path).ranges() if is_url(path) else path


def matching(pattern: str) -> list[pathlib.Path]:
    """The files and folders of a pattern with `*`, `?` or `[...]`, in order."""
    if not is_url(pattern):
        return sorted(pathlib.Path(name) for name in glob.glob(pattern))
    parts = pattern.split("/")
    first = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    return sorted(to_path("/".join(parts[:first])).glob("/".join(parts[first:])))


def files_below(folder: pathlib.Path) -> dict[str, Any]:
    """Every object of a bucket's folder by its name below it, with its `st_size` and the `st_mtime_ns` of contents."""
    return cast(Any, folder).below()


@contextlib.contextmanager
def local_to_read(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The file itself, or a copy of one in a bucket, which is deleted after the block."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="uae_jax_") as folder:
        copy = pathlib.Path(folder) / path.name
        cast(Any, path).download(copy)
        yield copy


@contextlib.contextmanager
def local_copies(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder itself, or copies of the small files that lie in one of a bucket, deleted after the block.

    Small files are those of `SMALL` bytes at most: settings, vocabularies and templates, no weights. An expected error
    of the block names the folder, not the copy.
    """
    if not is_url(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="uae_jax_") as copies:
        for name, known in files_below(folder).items():
            if "/" not in name and known.st_size <= SMALL:
                cast(Any, folder / name).download(pathlib.Path(copies) / name)
        try:
            yield pathlib.Path(copies)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(str(error).replace(copies, str(folder))) from None


@contextlib.contextmanager
def local_to_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """The file itself, or one that is copied into the bucket after the block, unless the block failed."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="uae_jax_") as folder:
        draft = pathlib.Path(folder) / path.name
        yield draft
        cast(Any, path).upload(draft)


def copy_file(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file with its time; within a bucket the store copies."""
    if is_url(source) and is_url(target) and source.parts[1] == target.parts[1]:
        cast(Any, source).copy(target, overwrite=True)
    elif is_url(source):
        target.parent.mkdir(parents=True, exist_ok=True)
        cast(Any, source).download(target) if not is_url(target) else target.write_bytes(source.read_bytes())
    elif is_url(target):
        cast(Any, target).upload(source)
    else:
        shutil.copy2(source, target)


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies all files of a folder into another, in place of those of the same names."""
    if not is_url(source) and not is_url(target):
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    for file in files_in(source):
        copy_file(source / file, target / file)


def files_in(folder: pathlib.Path) -> list[str]:
    """The names of all files below a folder, in order."""
    if is_url(folder):
        return list(files_below(folder))
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def remove_folder(folder: pathlib.Path) -> None:
    """Deletes a folder with all that is in it; one that is not there passes."""
    if is_url(folder):
        cast(Any, folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def problem(path: pathlib.Path, *, write: bool = False) -> str:
    """Why a folder of a bucket cannot be used, in one line; empty where it can, and for a local one.

    Args:
      path: it need not exist, its bucket must.
      write: also write an object of a few bytes there, and delete it.
    """
    if not is_url(path):
        return ""
    from uae_jax.files.buckets import bucket_problem  # fsspec, needed for URLs only

    return bucket_problem(path, write=write)


class LocalCopies:
    """A local folder for a library that cannot write to a bucket; what it wrote is copied there when that is asked for.

    Args:
      folder: where the files belong; a local one is written to directly.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._drafts = tempfile.TemporaryDirectory(prefix="uae_jax_") if is_url(folder) else None
        self.local = pathlib.Path(self._drafts.name) if self._drafts else folder
        self._copied: dict[str, tuple[int, int]] = {}

    def copy(self) -> None:
        """Copies what was written or has grown since the last time."""
        for name in files_in(self.local) if self._drafts else ():
            known = (self.local / name).stat()
            if self._copied.get(name) != (known.st_size, known.st_mtime_ns):
                copy_file(self.local / name, self.folder / name)
                self._copied[name] = known.st_size, known.st_mtime_ns

    def close(self) -> None:
        """Copies, and deletes the local files."""
        self.copy()
        if self._drafts:
            self._drafts.cleanup()
