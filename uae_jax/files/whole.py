"""Files written completely or not at all: first under a hidden name in the same folder, then renamed."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator

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
    """A hidden file beside `path` to write; it takes the name of `path` at the end, and is deleted on an error."""
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
    with replacing(pathlib.Path(path)) as partial:
        partial.write_bytes(data)


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes partial files left by a kill, in all subfolders; returns their number."""
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
