"""Files written completely or not at all: first under a hidden name in the same folder, then renamed.

An object of a bucket is whole by itself, and is written under its own name.
"""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator

from uae_jax.files.paths import is_url, local_to_write, to_path

PARTIAL = ".*.part"


@contextlib.contextmanager
def named(path: pathlib.Path) -> Iterator[None]:
    """Errors of the system get the file's name, which those of a write to an open file lack, such as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden file beside `path` to write; it takes the name of `path` at the end, and is deleted on an error.

    For a path of a bucket it is a local file, which is copied there at the end.
    """
    if is_url(path):
        with local_to_write(path) as draft:
            yield draft
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hidden name begins with a dot, because GenEval's pattern \d+\.png is not anchored at its end
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with named(path):
            yield partial
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: str | pathlib.Path, data: bytes) -> None:
    """Writes a file so that a kill leaves the old file or the new one; creates the folder if absent.

    Several processes may write the same file at once: the last one to finish wins.

    Raises:
      OSError: the file cannot be written; nothing is left of it.
    """
    path = to_path(path)
    if is_url(path):
        path.write_bytes(data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes partial files left by a kill, in all subfolders; returns their number."""
    if is_url(folder):
        return 0
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
