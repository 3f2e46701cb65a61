"""Reads changed inputs by every reader for long, and prints what ended with more than an error of one line.

    python -m benchmarks.fuzz --inputs=20000
    python -m benchmarks.fuzz --inputs=1000 --targets images indexes --seed=3

The inputs are parted evenly among the targets. The exit code is 1 if something was found.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.fuzz.targets import Target, finding, make_targets


def fuzz(target: Target, inputs: int, start: int, folder: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Runs a target.

    Args:
      target: the reader.
      inputs: how many inputs are wanted; hypothesis makes fewer where its strategy has no more.
      start: seed of the inputs.
      folder: an empty one.

    Returns:
      The number of inputs that were read, and {what was found: the first such input}.
    """
    found: dict[str, Any] = {}
    count = 0

    @seed(start)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def each(value: Any) -> None:
        nonlocal count
        count += 1
        if problem := finding(target, value, folder):
            found.setdefault(problem, value)

    each()
    return count, found


def main(arguments: list[str] | None = None) -> int:
    """Prints one line a target and one a finding."""
    targets = make_targets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="inputs of all targets together")
    parser.add_argument(
        "--targets", nargs="+", choices=list(targets), default=list(targets), help="which; all if absent"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    options = parser.parse_args(arguments)
    share, total, problems = -(-options.inputs // len(options.targets)), 0, 0
    print(f"{'target':24} {'inputs':>8} {'seconds':>8} {'found':>6}", flush=True)
    for name in options.targets:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            count, found = fuzz(targets[name], share, options.seed, pathlib.Path(folder))
        total, problems = total + count, problems + len(found)
        print(f"{name:24} {count:8,} {time.perf_counter() - begin:8.1f} {len(found):6}", flush=True)
        for problem, value in found.items():
            print(f"  {problem}\n    input: {repr(value)[:300]}", flush=True)
    print(f"{'all':24} {total:8,} {'':8} {problems:6}")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main())
