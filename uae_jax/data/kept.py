"""What was found out of a folder, in a hidden file beside the data, so that a later start reads it instead.

The first line of the file says what it is, and has a digest of the rest. A file that is damaged, or of another version,
is passed over. Where the folder cannot be written, the file lies in the user's cache.
"""

import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from uae_jax.files.paths import files_below, is_url, real
from uae_jax.files.whole import write_bytes

# size in bytes and time of the last change in nanoseconds: the same of both means the same content
Stamp = tuple[int, int]
LOOKED_AT_ONCE = 1024


def places(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Where a file may be kept: in the folder, and in the user's cache."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path("~/.cache").expanduser())
    own = hashlib.blake2b(os.fsencode(real(folder)), digest_size=8).hexdigest()
    return folder / f".uae_jax_{name}", cache / "uae_jax" / f"{own}_{name}"


def read_kept(folder: pathlib.Path, name: str, version: str) -> list[dict[str, Any]]:
    """The contents that are kept of a folder under a name, without damaged and foreign ones; that of the cache last."""
    found = []
    for path in places(folder, name):
        try:
            head, _, body = path.read_bytes().partition(b"\n")
            if json.loads(head) == _head(name, version, body):
                found.append(json.loads(body))
        except (OSError, ValueError, RecursionError):
            continue
    return found


def keep(folder: pathlib.Path, name: str, version: str, content: dict[str, Any]) -> str:
    """Keeps a content, completely or not at all.

    Returns:
      Empty, or why it is kept nowhere.
    """
    body = json.dumps(content, separators=(",", ":")).encode("ascii")
    head = json.dumps(_head(name, version, body)).encode("ascii")
    problem = ""
    for path in places(folder, name):
        try:
            write_bytes(path, head + b"\n" + body)
            return ""
        except OSError as error:
            problem = f"{path}: {error.strerror or error}"
    return problem


def _head(name: str, version: str, body: bytes) -> dict[str, str]:
    return {"uae_jax": name, "version": version, "digest": hashlib.blake2b(body, digest_size=16).hexdigest()}


def stamps(folder: pathlib.Path, files: Iterable[str]) -> dict[str, Stamp]:
    """The stamp of each file below a folder, without those that do not exist; links are followed.

    In a bucket the store's own version of an object takes the place of the time.
    """
    if is_url(folder):  # one request for a thousand of them
        known = files_below(folder)
        return {file: (known[file].st_size, known[file].st_mtime_ns) for file in files if file in known}
    top = os.fspath(folder)

    def look(some: tuple[str, ...]) -> list[tuple[str, Stamp]]:
        found = []
        for file in some:
            try:
                known = os.stat(os.path.join(top, file))
            except OSError:
                continue
            found.append((file, (known.st_size, known.st_mtime_ns)))
        return found

    listed = iter(files)
    blocks = iter(lambda: tuple(itertools.islice(listed, LOOKED_AT_ONCE)), ())
    with concurrent.futures.ThreadPoolExecutor() as pool:  # a look over a network takes a millisecond
        return {file: stamp for found in pool.map(look, blocks) for file, stamp in found}
