"""Whole RL steps, their phases, and inference: this package and the PyTorch stack side by side on the same weights.

    python -m benchmarks.unified_step [--checkpoint=DIR] [--side=jax|torch|both] [--images=2 --group=4 ...] [--json=FILE]

Without a checkpoint it makes one of the preset `mini`'s size. Everything runs in a process of its own, the sides in turn:
the one compiled step with its memory, the same with its phases compiled apart, and inference; `--compile` adds the PyTorch
side with `torch.compile`. Before anything is timed, greedy captions, final latents and rewards of both sides are compared.

One table; with --json one object a line: `side`, `stage`, seconds of each phase and of the whole step (`total`) as medians,
`cpu_seconds` of all threads, `peak_bytes` above what the process held before it read the model, `compile_seconds` of a first run and `cached_compile_seconds`
of a process that finds the compiled program on disk, and the machine's `load` meanwhile.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.measure import memory, time_call
from benchmarks.step_settings import INFERENCE, PHASES, STAGES, Inputs, Settings

COLUMNS = ("jax", "torch", "torch_compiled")
TOLERANCE = {"greedy_ids": 0.0, "latents": 1e-3, "rewards": 1e-3}


def open_side(column: str, folder: pathlib.Path, inputs: Inputs, stage: str):
    """`jax_side.JaxSide` or `torch_side.TorchSide`, imported only where it is used."""
    if column == "jax":
        from benchmarks.jax_side import JaxSide

        return JaxSide(folder, inputs, stage)
    from benchmarks.torch_side import TorchSide

    return TorchSide(folder, inputs, stage, compiled=column == "torch_compiled")


def import_libraries(column: str) -> None:
    """Libraries are not counted as a step's memory."""
    if column == "jax":
        import benchmarks.jax_side  # noqa: F401
    else:
        import benchmarks.torch_side  # noqa: F401


def work(column: str, stage: str, what: str, folder: pathlib.Path, place: pathlib.Path, repeats: int) -> dict:
    """One piece of work in this process.

    Args:
      column: of `COLUMNS`.
      stage: of `STAGES`, or `inference`.
      what: `step`, `phases` (of `inference` too) or `check`.
      folder: the checkpoint.
      place: of the inputs.
      repeats: timed calls; 0 for the first one alone.

    Returns:
      Of `time_call` for each call by name, and `peak_bytes`.
    """
    import_libraries(column)
    before = memory("VmRSS")
    side = open_side(column, folder, Inputs.load(place), stage)
    if what == "check":
        np.savez(place / f"{column}.npz", **side.checks())
        return {}
    calls = {"total": side.step()} if what == "step" else side.inference() if stage == "inference" else side.phases()
    timed = {name: time_call(call, repeats) for name, call in calls.items()}
    return {"calls": timed, "peak_bytes": memory("VmHWM") - before, "load": os.getloadavg()[0]}


def in_new_process(column: str, stage: str, what: str, options: argparse.Namespace, repeats: int) -> dict:
    """`work` in a process of its own; compiled programs are kept in the folder of the inputs."""
    place = pathlib.Path(options.place)
    command = [sys.executable, "-m", "benchmarks.unified_step", f"--checkpoint={options.checkpoint}", f"--place={place}",
               f"--work={column}:{stage}:{what}", f"--repeats={repeats}"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "TORCHINDUCTOR_CACHE_DIR": str(place / "torch"), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    """Prints how far the two sides are apart, and ends the program where they differ."""
    for column in ("jax", "torch"):
        in_new_process(column, "inference", "check", options, 0)
    found = [dict(np.load(pathlib.Path(options.place) / f"{column}.npz")) for column in ("jax", "torch")]
    for name, limit in TOLERANCE.items():
        ours, theirs = (arrays[name].astype(np.float64) for arrays in found)
        gap = float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-9))
        print(f"{name}: shape {ours.shape}, largest difference {gap:.1e} of the largest value", flush=True)
        if ours.shape != theirs.shape or gap > limit:
            raise SystemExit(f"error: the two sides do not compute the same {name}; there is nothing to compare in time")


def measure_stage(columns: Sequence[str], stage: str, options: argparse.Namespace) -> list[dict]:
    """The rows of a stage, one a column; the columns take turns."""
    rows = {column: {"side": column, "stage": stage} for column in columns}
    for column in columns:
        cold = in_new_process(column, stage, "step", options, 0)["calls"]["total"] if column != "torch" else None
        warm = in_new_process(column, stage, "step", options, options.repeats)
        total = warm["calls"]["total"]
        rows[column] |= {
            "total": total["seconds"], "fastest": total["fastest"], "cpu_seconds": total["cpu_seconds"], "peak_bytes": warm["peak_bytes"],
            "compile_seconds": max(cold["first"] - total["seconds"], 0.0) if cold else 0.0,
            "cached_compile_seconds": max(total["first"] - total["seconds"], 0.0) if cold else 0.0, "load": warm["load"]}
    for column in columns:
        timed = in_new_process(column, stage, "phases", options, options.repeats)["calls"]
        rows[column] |= {name: timed[name]["seconds"] for name in PHASES}
        rows[column]["phases_cpu_seconds"] = {name: timed[name]["cpu_seconds"] for name in PHASES}
    return list(rows.values())


def measure_inference(columns: Sequence[str], options: argparse.Namespace, settings: Settings) -> list[dict]:
    """Tokens of captions and pictures a second, for batches of `images`."""
    rows = []
    for column in columns:
        found = in_new_process(column, "inference", "phases", options, options.repeats)
        seconds = {name: found["calls"][name]["seconds"] for name in INFERENCE}
        rows.append({"side": column, "stage": "inference", **seconds, "total": sum(seconds.values()), "peak_bytes": found["peak_bytes"],
                     "caption_tokens_per_second": settings.images * settings.tokens / seconds["captions"],
                     "images_per_second": settings.images / seconds["pictures"], "load": found["load"]})
    return rows


def print_stage(rows: Sequence[dict], names: Sequence[str]) -> None:
    """One line a quantity, one column a side, and how many times as long the others take."""
    ours, *others = rows if rows[0]["side"] == "jax" and len(rows) > 1 else (None, *rows)
    heads = [f"{row['side']} / jax" for row in others] if ours else []
    print(f"\n| {rows[0]['stage']} | " + " | ".join([row["side"] for row in rows] + heads) + " |\n|---" * (1 + len(rows) + len(heads)) + "|")
    formats: dict[str, Callable[[float], str]] = {
        name: (lambda value: f"{value / 1e6:.0f} MB") if name == "peak_bytes" else
        (lambda value: f"{value:.1f} s") if "compile" in name else
        (lambda value: f"{value:.1f}") if "per_second" in name or name == "load" else (lambda value: f"{1e3 * value:.0f} ms") for name in names}
    for name in names:
        ratios = [f"{row[name] / ours[name]:.2f}" if ours[name] and "compile" not in name and name != "load" else "" for row in others] if ours else []
        print(f"| {name} | " + " | ".join([formats[name](row[name]) for row in rows] + ratios) + " |", flush=True)


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Checks, measures and prints everything."""
    sides = {"jax": COLUMNS[:1], "torch": COLUMNS[1:], "both": COLUMNS}[options.side]
    columns = [column for column in sides if options.compile or column != "torch_compiled"]
    if options.side == "both":
        compare(options)
    rows: list[dict] = []
    for stage in STAGES:
        rows += measure_stage(columns, stage, options)
        print_stage(rows[-len(columns):], (*PHASES, "total", "fastest", "cpu_seconds", "peak_bytes", "compile_seconds", "cached_compile_seconds", "load"))
    rows += measure_inference(columns, options, settings)
    print_stage(rows[-len(columns):], (*INFERENCE, "caption_tokens_per_second", "images_per_second", "peak_bytes", "load"))
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(options: argparse.Namespace, settings: Settings) -> None:
    """Writes checkpoint and inputs in processes of their own, so that this one stays free of both libraries."""
    if options.checkpoint is None:
        options.checkpoint = pathlib.Path(options.place) / "checkpoint"
        subprocess.run([sys.executable, "-m", "benchmarks.mini_checkpoint", str(options.checkpoint)], check=True)
    values = json.dumps(dataclasses.asdict(settings))
    subprocess.run([sys.executable, "-m", "benchmarks.unified_step", f"--checkpoint={options.checkpoint}", f"--place={options.place}",
                    f"--work=inputs:{values}"], check=True)


def read_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """The command line; every size of `Settings` is an option of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder in the official layout; made if it is not given")
    parser.add_argument("--side", choices=("jax", "torch", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of everything, after one that compiles and one more")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the column with torch.compile")
    parser.add_argument("--json", type=pathlib.Path, help="file for one JSON object a side and stage")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    parser.add_argument("--place", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        return options, Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def main() -> None:
    """Prints the tables, or does one piece of work for the process that does."""
    options, settings = read_options()
    kind, _, rest = options.work.partition(":")
    if kind == "inputs":
        from benchmarks.jax_side import make_inputs

        make_inputs(options.checkpoint, Settings(**json.loads(rest))).save(pathlib.Path(options.place))
    elif kind:
        print(json.dumps(work(kind, *rest.split(":"), options.checkpoint, pathlib.Path(options.place), options.repeats)))
    else:
        with tempfile.TemporaryDirectory() as options.place:
            prepare(options, settings)
            run(options, settings)


if __name__ == "__main__":
    main()
