"""Runs the ablations and controls of configs/ablations.py, and writes their tables and plots.

    python -m benchmarks.ablations --workdir=runs/ablations                       everything, three seeds
    python -m benchmarks.ablations --workdir=runs/ablations --seeds=0 --arms=caption_similarity,supervised_captions
    python -m benchmarks.ablations --workdir=runs/ablations --list                what there is, what is done, the
    commands python -m benchmarks.ablations --workdir=runs/ablations --tables_only         tables and plots of what is
    done

Every arm is a process of its own, `uae_jax.main`, in WORKDIR/ARM/seed_N with its log. Arms that start from another
one's export make it first; an arm that changes nothing (a group size that is the recipe's) reads the other one's
results. Ctrl-C and SIGTERM stop between two steps; the same command continues there. An arm that fails is told in one
line, the others go on, and the exit code is 1.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks import ablation_tables
from configs import ablations
from uae_jax.files.json_files import write_json
from uae_jax.settings import differences

ROOT = pathlib.Path(__file__).parents[1]
POLL = 0.2  # seconds between looks at a running arm


@functools.cache
def same_as(name: str) -> str:
    """The first arm with the same settings and the same start, the arm itself where there is none; scores do not
    count.
    """
    return next(other for other in ablations.ARMS if _identity(other) == _identity(name))


@functools.cache
def _identity(name: str) -> str:
    values = ablations.get_config(name).to_dict()
    values.pop("evaluation", None)
    return json.dumps(
        [values, {field: same_as(other) for field, other in ablations.ARMS[name].start.items()}], sort_keys=True
    )


def with_starts(names: Sequence[str]) -> list[str]:
    """The arms to run for these, in order: their references and what they start from too, each of several equal arms
    once.

    Raises:
      ValueError: an arm does not exist.
    """
    wanted: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in ablations.ARMS:
            raise ValueError(f"there is no arm {name!r}; choose from {', '.join(ablations.ARMS)}")
        name = same_as(name)
        if name not in wanted:
            wanted.add(name)
            todo += [*ablations.ARMS[name].start.values(), ablations.TOPICS[ablations.ARMS[name].topic].reference]
    return [name for name in ablations.ARMS if name in wanted]


@dataclasses.dataclass(frozen=True)
class Job:
    """One arm with one seed: `name`, `seed`, the `workdir` of all, and `changes` (field=value) to every arm that has
    the field.
    """

    name: str
    seed: int
    workdir: pathlib.Path
    changes: tuple[str, ...] = ()

    @property
    def folder(self) -> pathlib.Path:
        """Of its run."""
        return ablation_tables.folder_of(self.workdir, self.name, self.seed)

    def starts(self) -> dict[str, "Job"]:
        """Config field to the job whose workdir goes there."""
        return {
            field: dataclasses.replace(self, name=same_as(other))
            for field, other in ablations.ARMS[self.name].start.items()
        }

    def overrides(self) -> list[str]:
        """The `changes` that the arm's configuration has a field for."""
        config, found = ablations.get_config(self.name), []
        for change in self.changes:
            section = config
            *path, last = change.partition("=")[0].split(".")
            for part in path:
                section = section.get(part, {})
            found += [change] if last in section else []
        return found

    def arguments(self) -> list[str]:
        """Of the process."""
        fields = {"seed": str(self.seed)} | {field: str(job.folder) for field, job in self.starts().items()}
        return [
            f"--config={ROOT / 'configs' / 'ablations.py'}:{self.name}",
            f"--workdir={self.folder}",
            *(f"--config.{field}={value}" for field, value in fields.items()),
            *(f"--config.{change}" for change in self.overrides()),
        ]

    def settings(self) -> dict:
        """What decides the result, as JSON keeps it; of the loop nothing does."""
        config = ablations.get_config(self.name).to_dict()
        config.pop("loop", None)
        starts = {field: job.name for field, job in self.starts().items()}
        return json.loads(json.dumps({"config": config, "starts": starts, "changes": self.overrides()}))

    def record(self) -> dict:
        """`arm.json`: `settings`, `finished` and `minutes`; empty before the first start."""
        path = self.folder / ablation_tables.RECORD
        return json.loads(path.read_text()) if path.exists() else {}

    def write_record(self, finished: bool, minutes: float) -> None:
        """Replaces `arm.json` as a whole."""
        write_json(
            self.folder / ablation_tables.RECORD,
            {"settings": self.settings(), "finished": finished, "minutes": round(minutes, 3)},
        )


class Stop:
    """Remembers the first SIGINT or SIGTERM and passes it on to the running arm; the second one ends the arm at
    once.
    """

    def __init__(self):
        self.signum, self.process = 0, None

    def __enter__(self) -> "Stop":
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        again, self.signum = bool(self.signum), number
        if self.process is not None and self.process.poll() is None:
            self.process.kill() if again else self.process.terminate()


def run_job(job: Job, command: Sequence[str], stop: Stop) -> str:
    """Runs one arm to its end: "" when it is finished, else what went wrong in one line."""
    job.folder.mkdir(parents=True, exist_ok=True)
    record = job.record()
    if record and record["settings"] != job.settings():
        changed = "; ".join(differences(record["settings"], job.settings()))
        return f"{job.folder} was made with other settings ({changed}); move it away, or choose another --workdir"
    spent = record.get("minutes", 0.0)
    job.write_record(False, spent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    # most arms share most of their compiled programs
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(job.workdir / "compiled"))
    begin, log = time.monotonic(), job.folder / "log.txt"
    with log.open("a") as output:
        # a session of its own: Ctrl-C in the terminal reaches this command alone, which asks the arm once
        stop.process = subprocess.Popen(
            [*command, *job.arguments()],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        if stop.signum:
            stop.process.terminate()
        while (code := stop.process.poll()) is None:
            time.sleep(POLL)
            if sys.stderr.isatty():
                print(f"\r\033[K    {last_line(log)[:100]}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    job.write_record(code == 0, spent + (time.monotonic() - begin) / 60)
    return "" if code == 0 else f"{last_line(log) or f'it ended with code {code}'} ({log})"


def last_line(path: pathlib.Path) -> str:
    """The last words of a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").replace("\r", "\n").splitlines()
            if line.strip()
        ]
    return lines[-1] if lines else ""


def run_all(jobs: Sequence[Job], command: Sequence[str], stop: Stop) -> int:
    """Runs what is not finished, one after the other; 0, 1 when some failed, 128 + signal when stopped."""
    failed: set[tuple[str, int]] = set()
    took: list[float] = []
    for number, job in enumerate(jobs, 1):
        if stop.signum:
            break
        what = f"[{number}/{len(jobs)}] seed {job.seed} {job.name}"
        record = job.record()
        if record.get("finished") and record["settings"] == job.settings():
            print(f"{what}: done before in {record['minutes']:.1f} min", flush=True)
            continue
        broken = [other.name for other in job.starts().values() if (other.name, job.seed) in failed]
        if not broken:
            left = f", about {sum(took) / len(took) * (len(jobs) - number + 1):.0f} min to go" if took else ""
            print(f"{what}: running{left}", flush=True)
        wrong = f"skipped, because it starts from {broken[0]}" if broken else run_job(job, command, stop)
        if stop.signum:
            break
        if wrong:
            failed.add((job.name, job.seed))
            print(f"{what}: failed: {wrong}", file=sys.stderr, flush=True)
        else:
            took.append(job.record()["minutes"])
            print(
                f"{what}: {ablation_tables.headline(job.workdir, job.name, job.seed)} in {took[-1]:.1f} min", flush=True
            )
    if stop.signum:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + stop.signum
    if failed:
        print(f"{len(failed)} of {len(jobs)} failed; the same command tries them again", file=sys.stderr)
    return int(bool(failed))


def print_list(jobs: Sequence[Job], names: Sequence[str]) -> None:
    """Arms with what they vary and their state, then the commands of those that are not done."""
    for name in names:
        arm, equal = ablations.ARMS[name], same_as(name)
        states = [job for job in jobs if job.name == equal]
        done = [job.record()["minutes"] for job in states if job.record().get("finished")]
        state = f"{len(done)} of {len(states)} seeds done" + (f", {sum(done) / len(done):.1f} min each" if done else "")
        print(
            f"{name:24s} {ablations.TOPICS[arm.topic].title}: {arm.label} [{state}]"
            + (f" = {equal}" if equal != name else "")
        )
    print()
    for job in jobs:
        if not job.record().get("finished"):
            print("python " + shlex.join([*MAIN[1:], *job.arguments()]))


MAIN = (sys.executable, "-m", "uae_jax.main")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of all runs; the same one continues")
    made.add_argument("--arms", default="", help="names with commas between; all when empty")
    made.add_argument(
        "--seeds",
        default="0,1,2",
        help="numbers with commas between (0,1,2); every arm runs with the first one before the second one starts",
    )
    made.add_argument(
        "--docs",
        type=pathlib.Path,
        default=None,
        help="Markdown page for the tables, such as dev/results.md, between two marks or at its end; plots go to "
        "images/ beside it. WORKDIR/results.md when not given",
    )
    made.add_argument("--list", action="store_true", help="list the arms and the commands to run, and end")
    made.add_argument("--tables_only", action="store_true", help="write tables and plots of what is done, and end")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="the same change in every arm that has the field, to try the command: --set=evaluation.images=8",
    )
    made.add_argument("--command", default="", help=argparse.SUPPRESS)  # in place of uae_jax.main, for tests
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        names = [name.strip() for name in options.arms.split(",") if name.strip()] or list(ablations.ARMS)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        for change in options.set:
            if "=" not in change:
                raise ValueError(f"--set needs FIELD=VALUE, not {change!r}")
        workdir = options.workdir.absolute()
        runs = with_starts(names)
        jobs = [Job(name, seed, workdir, tuple(options.set)) for seed in seeds for name in runs]
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if options.list:
        print_list(jobs, names)
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    code = 0
    if not options.tables_only:
        with Stop() as stop:
            code = run_all(jobs, shlex.split(options.command) or MAIN, stop)
    page = (options.docs or workdir / "results.md").absolute()
    shown = [name for name in ablations.ARMS if name in {*names, *runs}]
    try:
        missing = ablation_tables.write_page(page, workdir, shown, seeds, same_as)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code or 1
    print(f"tables and plots: {page}" + (f" ({missing} runs missing)" if missing else ""))
    return code


if __name__ == "__main__":
    sys.exit(main())
