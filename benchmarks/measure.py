"""Seconds and memory of one side, measured in a process of its own."""

import pathlib
import re
import statistics
import time
from collections.abc import Callable


def memory(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far (Linux)."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1))


def time_call(call: Callable[[], None], repeats: int) -> dict[str, float]:
    """Calls once to compile, once to warm up, then `repeats` times; a call returns when its results are there.

    Returns:
      `first`, seconds of the first call; with repeats also `seconds`, the median, and `fastest`.
    """
    taken = []
    for _ in range(repeats + 2 if repeats else 1):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    timed = taken[2:]
    return {"first": taken[0]} | ({"seconds": statistics.median(timed), "fastest": min(timed)} if timed else {})
