"""Ends a run of all stages at random times, in every way that machines know, and continues it by the same command.

    python -m benchmarks.chaos --out=chaos --kills=40 --seed=0

First comes a run of the built-in model that nothing disturbs, of few steps and small scores. Then the same run is ended
so many times, each time by one of `WAYS` at a random time, and continued to its end. The exports have to be equal byte
for byte, no run may need a hand, and no complete checkpoint may be lost. With `--processes=4` a run has four processes,
and one of them is killed each time: the others have to end by themselves, and say why.
A row for each kill goes to `chaos.jsonl`; the same command continues where it stopped. The exit code is 1 if an export
differs, a checkpoint is lost, a traceback is shown, or a run needs a hand.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection

from uae_jax.command_line import CommandParser, in_range

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
LOST = "another process of this run is gone"
SMALL = (
    *(f"{stage}.steps=6" for stage in STAGES),
    *("loop.save_every=2", "loop.eval_every=3"),
    *("evaluation.images=2", "evaluation.images_during=2", "evaluation.samples=2", "evaluation.sampler_steps=2"),
    *("evaluation.geneval_per_tag=0", "evaluation.also_guidance_scale=0", "evaluation.questions="),
    *("pretrain.batch_size=4", "cold_start.batch_size=2", "cold_start.sampler_steps=2"),
    *("gen_for_und.batch_size=2", "gen_for_und.group_size=2", "gen_for_und.max_new_tokens=8"),
    *("gen_for_und.sampler_steps=2", "und_for_gen.batch_size=2", "und_for_gen.group_size=2"),
    *("und_for_gen.max_new_tokens=8", "guard.reward_fall=0", "guard.kl=0", "guard.truncated=0"),
    "guard.understanding_fall=0",
)
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP}
WAYS = (*SIGNALS, "full disk", "read-only workdir", "half a rename", "a flipped bit", "a hang", "a hung source")
READ_ONLY = "mount --bind '{0}' '{0}' && mount -o remount,ro,bind '{0}' && exec \"$@\""
HUNG_SECONDS = 5
GONE_SECONDS = 300  # in which the other processes of a run have to notice that one is gone
# a data source that does not answer any more after so many images, and a scheduler that then asks the run to stop
HUNG_SOURCE = """
import os, signal, threading
from uae_jax import main
from uae_jax.data import sources
read, count = sources.SceneSource.__getitem__, [0]
def hung(source, index):
    count[0] += 1
    if count[0] == {images}:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    if count[0] >= {images}:
        threading.Event().wait()
    return read(source, index)
sources.SceneSource.__getitem__ = hung
main.GRACE_SECONDS = 2.0
main.program()
"""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How a run ended: its exit code, what it said, and its seconds."""

    code: int
    said: str
    seconds: float


def commands(workdir: pathlib.Path, processes: int) -> list[list[str]]:
    """The command that is given again and again, one for each process of a run."""
    settings = [f"--config.{setting}" for setting in SMALL]
    base = [sys.executable, "-m", "uae_jax.main", "--config=unified_grpo", f"--workdir={workdir}", *settings]
    if processes == 1:
        return [base]
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{listener.getsockname()[1]}"
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=2", f"--config.mesh.tensor={processes // 2}"]
    return [[*base, *mesh, coordinator, f"--processes={processes}", f"--process_id={k}"] for k in range(processes)]


def digest(workdir: pathlib.Path) -> str:
    """A digest of all tensors and settings of an export; its card, which tells the seconds of the run, is left out."""
    found, card = hashlib.sha256(), workdir / "export" / "README.md"
    for path in sorted((workdir / "export").rglob("*")):
        if path.is_file() and path != card:
            found.update(path.relative_to(workdir).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def steps_on_disk(workdir: pathlib.Path, damaged: Collection[str] = ()) -> dict[str, int]:
    """The newest whole checkpoint of each stage; infinite where the stage has finished and left what it trained.

    Args:
      damaged: `STAGE/STEP` of the checkpoints that were damaged on purpose.
    """
    found = {}
    for stage in STAGES:
        folder = workdir / "checkpoints" / stage
        steps = [int(path.parent.name) for path in folder.glob("*/commit_success.txt") if path.parent.name.isdigit()]
        steps = [step for step in steps if f"{stage}/{step}" not in damaged]
        if (workdir / "trained" / stage).is_dir():
            found[stage] = math.inf
        elif steps:
            found[stage] = max(steps)
    return found


def text_of(log: pathlib.Path) -> str:
    """What a run has said so far."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def wait_until(process: subprocess.Popen, log: pathlib.Path, steps: int, delay: float) -> None:
    """Waits until a run has said so many steps, and then some seconds, or has ended."""
    while process.poll() is None and text_of(log).count(" step ") < steps:
        time.sleep(0.1)
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)


def run(workdir: pathlib.Path, log: pathlib.Path, way: str = "", steps: int = 0, delay: float = 0.0) -> Attempt:
    """One run, ended in a way so many steps and seconds after its start; without a way it goes to its end."""
    arguments, prepare = commands(workdir, 1)[0], None
    if way == "a hung source":
        arguments[1:3] = ["-c", HUNG_SOURCE.format(images=8 + 10 * steps)]
    if way == "full disk":
        prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))  # noqa: E731
    if way == "read-only workdir":
        arguments = ["unshare", "-m", "sh", "-c", READ_ONLY.format(workdir), "sh", *arguments]
    begin = time.monotonic()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, preexec_fn=prepare) as process,
    ):
        if way in SIGNALS or way == "a hang":
            wait_until(process, log, steps, delay)
            if way == "a hang":
                process.send_signal(signal.SIGSTOP)
                time.sleep(HUNG_SECONDS)
            process.send_signal(SIGNALS.get(way, signal.SIGKILL))
        code = process.wait()
    return Attempt(code, text_of(log), time.monotonic() - begin)


def run_together(
    workdir: pathlib.Path,
    log: pathlib.Path,
    processes: int,
    gone: int | None = None,
    steps: int = 0,
    delay: float = 0.0,
) -> Attempt:
    """One run of several processes; the one of number `gone` is killed so many steps and seconds after the start.

    Raises:
      RuntimeError: the others do not end by themselves within `GONE_SECONDS`.
    """
    # programs read from the cache do not agree on the order of their collectives on CPU
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    begin, logs = time.monotonic(), [log, *(log.with_suffix(f".{k}.log") for k in range(1, processes))]
    started = []
    for path, arguments in zip(logs, commands(workdir, processes), strict=True):
        with path.open("w", encoding="utf-8") as file:
            started.append(subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment))
    try:
        limit = None
        if gone is not None:
            wait_until(started[gone], log, steps, delay)
            started[gone].kill()
            limit = GONE_SECONDS
        codes = [process.wait(limit) for process in started]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{GONE_SECONDS} s after process {gone} was killed another goes on: see {log}") from error
    finally:
        for process in started:
            process.kill()
    said = "".join(map(text_of, logs))
    return Attempt(max(codes, key=abs), said, time.monotonic() - begin)


def newest(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder of the newest checkpoint of all; None without one."""
    paths = [path.parent for path in (workdir / "checkpoints").glob("*/*/commit_success.txt")]
    paths = [path for path in paths if path.name.isdigit()]
    return max(paths, key=lambda path: (path.parent.stat().st_mtime, int(path.name)), default=None)


def damage(workdir: pathlib.Path, way: str, rng: random.Random) -> str:
    """Does to the newest checkpoint what a bucket's rename that stopped half-way does, or a bad disk.

    Returns:
      `STAGE/STEP` of the checkpoint that it costs; empty where there is none.
    """
    folder = newest(workdir)
    if folder is None:
        return ""
    cost = f"{folder.parent.name}/{folder.name}"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if way == "half a rename":
        shutil.move(folder, folder.with_name(f"{folder.name}.orbax-checkpoint-tmp"))
        for path in files[::2]:
            if path.name != "commit_success.txt":
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp") / path.relative_to(folder), path)
        return cost
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return cost


def kill(
    workdir: pathlib.Path, number: int, rng: random.Random, out: pathlib.Path, processes: int, damaged: Collection[str]
) -> dict:
    """One run that is ended, and the row that tells of it; `damaged` were so earlier in the same run."""
    way, damage_now = WAYS[number % len(WAYS)], ""
    ended, log = way, out / f"kill_{number:03d}.log"
    if processes == 1 and way in ("half a rename", "a flipped bit"):
        damage_now, ended = damage(workdir, way, rng), "SIGKILL"
    before = steps_on_disk(workdir, {*damaged, damage_now})
    steps = rng.randrange(5)
    delay = rng.uniform(0.0, 3.0) if steps else rng.uniform(0.0, 30.0)  # also in imports, reading and compilation
    if processes == 1:
        attempt = run(workdir, log, ended, steps, delay)
    else:
        gone = rng.randrange(processes)
        way = f"process {gone} of {processes} gone"
        attempt = run_together(workdir, log, processes, gone, steps, delay)
    after = steps_on_disk(workdir)  # a damaged one may be written anew by a run that goes on from the one before it
    lost = {stage: step for stage, step in before.items() if after.get(stage, 0) < step}
    row = {"kill": number, "way": way, "code": attempt.code, "seconds": round(attempt.seconds, 1)}
    shown = {"before": before, "after": after, "lost": lost}
    shown = {name: {stage: str(step) for stage, step in steps.items()} for name, steps in shown.items()}
    # what another process has lost is told with its traceback, since a device may have failed instead
    unasked = "Traceback" in attempt.said and LOST not in attempt.said
    return row | shown | {"damaged": damage_now, "traceback": unasked}


def finish(workdir: pathlib.Path, log: pathlib.Path, processes: int) -> float:
    """Continues a run to its end, and returns its seconds.

    Raises:
      RuntimeError: the command does not get there by itself.
    """
    again = run if processes == 1 else functools.partial(run_together, processes=processes)
    attempt = again(workdir, log)
    if attempt.code:
        attempt = again(workdir, log)  # a stage without a readable checkpoint begins again with the next command
    if attempt.code:
        raise RuntimeError(f"{workdir} needs a hand: see {log}")
    return attempt.seconds


def chaos(options: argparse.Namespace) -> None:
    """Runs, ends and compares; what was done before is not done again."""
    out, processes = pathlib.Path(options.out).absolute(), options.processes
    out.mkdir(parents=True, exist_ok=True)
    # compiled once: a restart is to be killed in its steps, not in its compilation
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    rows_path, whole = out / "chaos.jsonl", out / "whole"
    if not (whole / "report.html").exists():
        finish(whole, out / "whole.log", processes)
    wanted = digest(whole)
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()] if rows_path.exists() else []
    for number in range(len(rows), options.kills):
        runs = sum("export" in row for row in rows)  # each is whole at its end, and the next one begins
        workdir = out / f"run_{options.seed}_{runs}"
        last = max((index + 1 for index, row in enumerate(rows) if "export" in row), default=0)
        damaged = {row["damaged"] for row in rows[last:]}
        row = kill(workdir, number, random.Random(f"{options.seed}/{number}"), out, processes, damaged)
        if row["code"] == 0 or number == options.kills - 1:
            finish(workdir, out / f"end_{number:03d}.log", processes)
            row["export"] = digest(workdir) == wanted
            shutil.rmtree(workdir)
        rows.append(row)
        with rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    wrong = [row for row in rows if row.get("export") is False or row["lost"] or row["traceback"]]
    print(f"{options.kills} kills of seed {options.seed}: {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


def main() -> None:
    """The command."""
    parser = CommandParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--out", required=True, help="folder of runs, logs and rows")
    parser.add_argument("--kills", help="how often a run is ended", default=40, **in_range(int, low=1))
    parser.add_argument("--seed", help="of ways and times", default=0, **in_range(int, low=0))
    parser.add_argument("--processes", help="of each run: 1, or an even number", default=1, **in_range(int, low=1))
    options = parser.parse_args()
    if options.processes > 1 and options.processes % 2:
        parser.error(f"--processes={options.processes} is odd; give 1, 2 or 4")
    chaos(options)


if __name__ == "__main__":
    main()
