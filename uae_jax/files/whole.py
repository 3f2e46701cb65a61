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


def write_bytes(path: str | pathlib.Path, data: bytes) -> None:
    """Writes a file so that a kill leaves the old file or the new one; creates the folder if absent.

    Several processes may write the same file at once: the last one to finish wins.

    Raises:
      OSError: the file cannot be written; nothing is left of it.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hidden name begins with a dot, because GenEval's pattern \d+\.png is not anchored at its end
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with named(path):
            partial.write_bytes(data)
            os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes partial files left by a kill, in all subfolders; returns their number."""
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
