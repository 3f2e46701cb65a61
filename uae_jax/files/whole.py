"""Files written completely or not at all: first under a hidden name in the same folder, then renamed."""

import contextlib
import os
import pathlib
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
    """Writes a file so that a kill leaves the old file or the new one; creates the folder if absent."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hidden name begins with a dot, because GenEval's pattern \d+\.png is not anchored at its end
    partial = path.with_name(f".{path.name}.part")
    with named(path):
        partial.write_bytes(data)
        os.replace(partial, path)


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes partial files left by a kill, in all subfolders; returns their number."""
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
