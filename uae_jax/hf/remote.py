"""Tensors of safetensors files in a bucket: headers and tensors by ranges, ahead of their use, each of them once."""

import collections
import concurrent.futures
import json
import math
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from uae_jax.files.paths import read_range

FIRST = 2**18  # bytes of the first request, in which most headers end
READERS = 8  # requests at a time
AHEAD = 2**29  # bytes that are asked for before they are needed
KEPT = 2**29  # bytes that are kept after they were used: three parameters may be pieces of one tensor


def read_header(file: pathlib.Path) -> tuple[int, dict[str, Any], int]:
    """The length of a file's header, the header, and the size of the file; one request or two.

    Raises:
      ValueError: it is no header of safetensors; the message has the reason alone.
    """
    size = file.stat().st_size
    start = read_range(file, 0, FIRST)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > size - 8:
        raise ValueError("it ends before its header does")
    text = start[8 : 8 + length]
    text += read_range(file, 8 + len(text), length - len(text)) if len(text) < length else b""
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return length, header, size


def check_filled(header: dict[str, Any], room: int, item_bytes: Callable[[str], int | None]) -> None:
    """Checks that the tensors of a header follow each other and fill the file.

    Args:
      header: without metadata.
      room: bytes behind the header.
      item_bytes: bytes of a number by the precision's name; None where that is unknown.

    Raises:
      ValueError: they do not; the message has the reason alone.
    """
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        size = item_bytes(entry["dtype"])
        if start != end or stop < start or size and stop - start != size * math.prod(entry["shape"]):
            raise ValueError(f"the offsets of {name} do not fit")
        end = stop
    if end != room:
        raise ValueError(f"its tensors have {end:,} bytes, and {room:,} are there")


class Reads:
    """Reads pieces of files in the order in which they were said to be needed, some of them at once.

    Args:
      places: (file, start, size in bytes) of each piece by name.
    """

    def __init__(self, places: dict[str, tuple[pathlib.Path, int, int]]):
        self._places = places
        self._expected: collections.deque[str] = collections.deque()
        self._coming: dict[str, concurrent.futures.Future[bytes]] = {}
        self._used: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def expect(self, names: Sequence[str]) -> None:
        """Says which pieces will be read next, in this order."""
        with self._lock:
            self._expected = collections.deque(name for name in dict.fromkeys(names) if name in self._places)
            self._start()

    def read(self, name: str) -> bytes:
        """The bytes of a piece."""
        with self._lock:
            if name in self._used:
                self._used.move_to_end(name)
                return self._used[name]
            coming = self._coming.pop(name, None)
            if coming is None and name in self._expected:
                self._expected.remove(name)
        data = coming.result() if coming else read_range(*self._places[name])
        with self._lock:
            self._used[name] = data
            while len(self._used) > 1 and sum(map(len, self._used.values())) > KEPT:
                self._used.popitem(last=False)
            self._start()
        return data

    def _start(self) -> None:
        """Asks for more pieces, as long as there is room for them."""
        waiting = sum(self._places[name][2] for name in self._coming)
        while self._expected and (not self._coming or waiting + self._places[self._expected[0]][2] <= AHEAD):
            name = self._expected.popleft()
            if name in self._used:
                continue
            self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(READERS, "bucket")
            self._coming[name] = self._pool.submit(read_range, *self._places[name])
            waiting += self._places[name][2]
        if not self._expected and not self._coming and self._pool:
            self._pool.shutdown(wait=False)
            self._pool = None
