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
      `first`, seconds of the first call; with repeats also `seconds`, the median, `fastest`, and `cpu_seconds`, the
      median of what all threads worked, which other programs on the machine hardly change.
    """
    taken = []
    for _ in range(repeats + 2 if repeats else 1):
        begin, cpu = time.perf_counter(), time.process_time()
        call()
        taken.append((time.perf_counter() - begin, time.process_time() - cpu))
    clock, cpu = ([pair[side] for pair in taken[2:]] for side in (0, 1))
    timed = (
        {"seconds": statistics.median(clock), "fastest": min(clock), "cpu_seconds": statistics.median(cpu)}
        if clock
        else {}
    )
    return {"first": taken[0][0]} | timed
