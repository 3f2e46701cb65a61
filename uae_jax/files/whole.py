"""Files written completely or not at all: first under a hidden name in the same folder, then renamed."""

import os
import pathlib

PARTIAL = ".*.part"


def write_bytes(path: str | pathlib.Path, data: bytes) -> None:
    """Writes a file so that a kill leaves the old file or the new one; creates the folder if absent."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hidden name begins with a dot, because GenEval's pattern \d+\.png is not anchored at its end
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    os.replace(partial, path)


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes partial files left by a kill, in all subfolders; returns their number."""
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
