"""Seconds of a supervised step that computes the inputs of its frozen parts, and of one that reads them, side by side.

    python -m benchmarks.precomputed_step [--config=pretrain] [--repeats=8] [--json=FILE]

The inputs are computed into a temporary folder first. Both steps then run in turn on the same examples, so that a busy
machine slows both. The table has the median seconds of a step, and the seconds in which all inputs were computed.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.stage_steps import TimedStage
from uae_jax.config_file import apply_overrides, load_config, split_overrides
from uae_jax.settings import Mistakes, frozen
from uae_jax.stages.precompute import Request, precompute
from uae_jax.stages.precomputed import readers
from uae_jax.stages.run import Run
from uae_jax.stages.run_config import RunConfig


def compare(values: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """One object for each stage that can read: seconds of a step that computes and of one that reads."""
    config, found = frozen(RunConfig, values), []
    with tempfile.TemporaryDirectory() as place:
        out = pathlib.Path(place) / "inputs"
        begin = time.perf_counter()
        precompute(values, Request(out))
        made = time.perf_counter() - begin
        reading = dataclasses.replace(config, data=dataclasses.replace(config.data, precomputed=str(out)))
        runs = [Run(settings, pathlib.Path(place)) for settings in (config, reading)]
        for stage, parts in readers(config).items():
            sides = [TimedStage(run, stage) for run in runs]
            seconds = [[side.seconds() for side in sides] for _ in range(repeats + 1)][1:]
            computing, read = np.median(np.array(seconds), axis=0)
            for side in sides:
                side.data.close()
            row = {"stage": stage, "parts": list(parts), "computing_seconds": computing, "reading_seconds": read}
            found.append(row | {"precompute_seconds": made})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    overrides, others = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="pretrain", help="as for uae_jax.main")
    parser.add_argument("--repeats", type=int, default=8, help="timed steps of each side")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a stage")
    options = parser.parse_args(others)
    values, mistakes = apply_overrides(load_config(options.config).to_dict(), overrides)
    if mistakes:
        raise Mistakes(mistakes)
    found = compare(values, options.repeats)
    print(f"{'stage':12} {'read':17} {'computing s':>12} {'reading s':>10} {'saved':>6}")
    for row in found:
        saved = 1 - row["reading_seconds"] / row["computing_seconds"]
        print(
            f"{row['stage']:12} {', '.join(row['parts']):17} {row['computing_seconds']:12.3f} "
            f"{row['reading_seconds']:10.3f} {saved:6.0%}"
        )
    print(
        f"all inputs were computed in {found[0]['precompute_seconds']:.1f} s, on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}"
    )
    if options.json:
        options.json.write_text("".join(json.dumps(row, default=float) + "\n" for row in found))


if __name__ == "__main__":
    main()
