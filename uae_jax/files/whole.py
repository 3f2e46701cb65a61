"""Files that are whole or not there: each is written under a hidden name beside its place and then renamed."""

import os
import pathlib

PARTIAL = ".*.part"


def write_bytes(path: str | pathlib.Path, data: bytes) -> None:
    """Writes a file, in a folder that is made if absent, so that a kill leaves the old file or the new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the hidden name begins with a dot: GenEval's pattern \d+\.png is not anchored at its end
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    os.replace(partial, path)


def remove_partial(folder: pathlib.Path) -> int:
    """Deletes what a kill has left half written, in all subfolders; returns how many files that were."""
    found = [path for path in folder.rglob(PARTIAL) if path.is_file()]
    for path in found:
        path.unlink()
    return len(found)
