"""Runs the check; `benchmarks/gpu_check.sh` installs what it needs first.

    python -m benchmarks.gpu_check --out=gpu_check                  # on a card, at most 9 minutes
    python -m benchmarks.gpu_check --size=small --minutes=20        # a dry run on a CPU

After each part it writes gpu_check.json and gpu_check.md. A part that fails or takes too long costs no other one. The
same command again runs only what is not done yet for this commit, card and size. The exit code is 0 when at least one
part is done.
"""

import argparse
import datetime
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.gpu_check.card import identity
from benchmarks.gpu_check.report import JSON, PAGE, open_report, write_report
from benchmarks.gpu_check.schedule import PARTS, Part, run_part, select, time_limit
from uae_jax.files.json_files import read_json


def check(
    parts: Sequence[Part], out: pathlib.Path, work: pathlib.Path, size: str, minutes: float, setup_seconds: float = 0.0
) -> dict:
    """Runs the parts that are not done, one after the other, and writes the report after each.

    Args:
      parts: in order.
      out: folder of the two files.
      work: folder of what the parts share: compiled programs, configs, inputs.
      size: `full` or `small`.
      minutes: for all parts together.
      setup_seconds: how long the installation took, which does not count.

    Returns:
      The report.
    """
    report, begin = open_report(out, identity(size)), time.monotonic()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    run = {"date": today, "minutes": minutes, "seconds": 0.0, "setup_seconds": setup_seconds}
    waiting = [part for part in parts if report["parts"].get(part.name, {}).get("status") != "ok"]
    report["runs"] += [run] if waiting else []
    for part in parts:
        if part not in waiting:
            print(f"{part.name}: done in an earlier run", flush=True)
    while waiting:
        part, left = waiting[0], 60 * minutes - (time.monotonic() - begin)
        limit = time_limit(part, waiting, left)
        if limit < part.least:
            report["parts"].setdefault(part.name, {"status": "skipped-for-time"})  # what an earlier run left stays
            print(f"{part.name}: no time is left for it", flush=True)
        else:
            used = f"{60 * minutes - left:.0f} of {60 * minutes:.0f} s"
            print(f"[{used}] {part.name}, at most {limit:.0f} s ...", flush=True)
            before = report["parts"].get(part.name, {}).get("figures", {})
            found = report["parts"][part.name] = outcome(part, size, work, limit)
            if found["status"] != "ok" and len(before) > len(found.get("figures", {})):
                found["figures"] = before  # of an earlier run that came further
            said = f"{part.name}: {found['status']} in {found['seconds']:.0f} s"
            print(said, *found.get("error", ())[-3:], sep="\n    ", flush=True)
        waiting.pop(0)
        run["seconds"] = round(time.monotonic() - begin, 1)
        write_report(out, report)
    write_report(out, report)
    return report


def outcome(part: Part, size: str, work: pathlib.Path, limit: float) -> dict:
    """A part's row of the report, with the figures that it left."""
    found = run_part(part, size, work, limit)
    path = found.pop("figures_file")
    if path.exists():
        found["figures"] = read_json(path.parent, path.name)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu_check"), help="folder of the two files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small is a dry run, on any machine")
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--parts", default="", help=f"some of {names}; `steps` stands for all four")
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path(tempfile.gettempdir()) / "uae_jax_gpu_check",
        help="folder of compiled programs and inputs, for a second run; delete it afterwards",
    )
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        parts = select(options.parts)
    except ValueError as error:
        parser.error(str(error))
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}; it must be positive")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs is ended too
    out, work = options.out.resolve(), options.work.resolve() / options.size
    report = check(parts, out, work, options.size, options.minutes, options.setup_seconds)
    print(f"{out / JSON}\n{out / PAGE}")
    return 0 if any(part["status"] == "ok" for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
