"""Whole RL steps, their phases, and inference: this package and the PyTorch stack side by side on the same weights.

    python -m benchmarks.unified_step [--checkpoint=DIR] [--side=jax|torch|both] [--images=2 --group=4 ...]
    [--json=FILE] python -m benchmarks.unified_step --size=full --dtype=bfloat16 --image_size=512    # real sizes, on a
    GPU

Without a checkpoint it makes one of the preset `mini`'s size. The sides take turns, each stage in a process of its own:
the one compiled step with its memory, then its phases compiled apart; --no-compile leaves out the column with
`torch.compile`, which takes longer than all others. Before anything is timed, greedy captions, final latents and
rewards of both sides are compared.

One table a stage; with --json one object a line: `side`, `stage`, seconds of each phase and of the whole step (`total`)
as medians, `cpu_seconds` of all threads, `peak_bytes` above what the process held before it read the model (of the
accelerator where there is one), `compile_seconds` of a first run and `cached_compile_seconds` of a process that finds
the compiled program on disk (its peak is our `peak_bytes`; `compile_peak_bytes` is that of the one that compiles), the
machine's `load` meanwhile, and two shares of what it can do at best (`benchmarks.machine_rates`): `decoding_share` of
the copy bandwidth, after the first token, and `denoising_share` of the matrix rate.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import memory, time_call
from benchmarks.mini_checkpoint import SIZES
from benchmarks.step_settings import INFERENCE, PHASES, PREFILL, STAGES, Inputs, Settings

COLUMNS = ("jax", "torch", "torch_compiled")
COMPARED = (
    *PHASES,
    "total",
    "fastest",
    "cpu_seconds",
    "peak_bytes",
    *INFERENCE,
    "caption_tokens_per_second",
    "images_per_second",
)
# a rounding that tips one greedy token changes all that follow, so that bfloat16 captions are only counted
TOLERANCE = {
    "float32": {"greedy_ids": 0.0, "latents": 1e-3, "rewards": 1e-3},
    "bfloat16": {"greedy_ids": float("inf"), "latents": 0.2, "rewards": 0.1},
}


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
        from transformers import AutoTokenizer  # noqa: F401  (it brings torch where that is installed)

        import benchmarks.jax_side  # noqa: F401
    else:
        import benchmarks.torch_side  # noqa: F401


def work(column: str, stage: str, what: str, folder: pathlib.Path, place: pathlib.Path, repeats: int) -> dict:
    """One piece of work in this process.

    Args:
      column: of `COLUMNS`.
      stage: of `STAGES`, or `inference`.
      what: `time` for the step with its phases (or for inference), `start` for the step alone, `check`, or `rates` of
        the machine.
      folder: the checkpoint.
      place: of the inputs.
      repeats: timed calls.

    Returns:
      Of `time_call` for each call by name, `peak_bytes` of the step, `load`, and this package's `work`; or the rates.
    """
    import_libraries(column)
    inputs, before = Inputs.load(place), memory("VmRSS")
    if what == "rates":
        from benchmarks.machine_rates import machine_rates

        return machine_rates(inputs.settings.dtype)
    side = open_side(column, folder, inputs, stage)
    if what == "check":
        np.savez(place / f"{column}.npz", **side.checks())
        return {}
    calls = side.inference() if stage == "inference" else {"total": side.step()}
    timed = {name: time_call(call, repeats) for name, call in calls.items()}
    found = {"peak_bytes": side.device_peak() or memory("VmHWM") - before}
    if what == "time" and stage in STAGES:
        timed |= {name: time_call(call, repeats) for name, call in side.phases().items()}
        found["work"] = side.work() if column == "jax" else {}
    return found | {"calls": timed, "load": os.getloadavg()[0]}


def in_new_process(column: str, stage: str, what: str, options: argparse.Namespace, repeats: int) -> dict:
    """`work` in a process of its own; compiled programs are kept in the folder of the inputs."""
    place = pathlib.Path(options.place)
    command = [
        sys.executable,
        "-m",
        "benchmarks.unified_step",
        f"--checkpoint={options.checkpoint}",
        f"--place={place}",
        f"--work={column}:{stage}:{what}",
        f"--repeats={repeats}",
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(place / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(place / "torch"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | cache)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    """Prints how far the two sides are apart, and ends the program where they differ."""
    for column in ("jax", "torch"):
        in_new_process(column, "inference", "check", options, 0)
    found = [dict(np.load(pathlib.Path(options.place) / f"{column}.npz")) for column in ("jax", "torch")]
    for name, limit in TOLERANCE[options.dtype].items():
        ours, theirs = (arrays[name].astype(np.float64) for arrays in found)
        gap = (
            float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-9))
            if ours.shape == theirs.shape
            else float("inf")
        )
        print(
            f"{name}: shape {ours.shape}, largest difference {gap:.1e} of the largest value, "
            f"{np.mean(ours == theirs):.0%} equal",
            flush=True,
        )
        if ours.shape != theirs.shape or gap > limit:
            raise SystemExit(
                f"error: the two sides do not compute the same {name}; there is nothing to compare in time"
            )


def measure_stage(columns: Sequence[str], stage: str, options: argparse.Namespace) -> list[dict]:
    """The rows of a stage, one a column; the columns take turns."""
    rows, load = [], {}
    for column in columns:
        found = in_new_process(column, stage, "time", options, options.repeats)
        calls, load = found["calls"], load or found["work"]
        total = calls["total"]
        row = {
            "side": column,
            "stage": stage,
            **{name: calls[name]["seconds"] for name in (*PHASES, PREFILL) if name in calls},
            "total": total["seconds"],
            "fastest": total["fastest"],
            "cpu_seconds": total["cpu_seconds"],
            "peak_bytes": found["peak_bytes"],
            "load": found["load"],
            "phases_cpu_seconds": {name: calls[name]["cpu_seconds"] for name in PHASES},
        }
        if column != "torch":
            row["compile_seconds"] = max(total["first"] - total["seconds"], 0.0)
        if column == "jax":
            again = in_new_process(column, stage, "start", options, 1)
            row["cached_compile_seconds"] = max(again["calls"]["total"]["first"] - total["seconds"], 0.0)
            row |= {"peak_bytes": again["peak_bytes"], "compile_peak_bytes": found["peak_bytes"]}
        rows.append(row | shares(row, load, options.rates))
    return rows


def shares(row: dict, load: dict[str, float], rates: dict[str, float]) -> dict[str, float]:
    """How much of the machine decoding and denoising use.

    Args:
      row: seconds by phase.
      load: of `JaxSide.work`; empty where this package is not measured.
      rates: of `machine_rates.machine_rates`.
    """
    found = {}
    if load:
        found["denoising_share"] = load["denoising_flops"] / row["denoising"] / rates["matrix_rate"]
    if load and row.get(PREFILL, row["sampling"]) < row["sampling"]:
        found["decoding_share"] = load["decoding_bytes"] / (row["sampling"] - row[PREFILL]) / rates["copy_bandwidth"]
    return found


def measure_inference(columns: Sequence[str], options: argparse.Namespace, settings: Settings) -> list[dict]:
    """Tokens of captions and pictures a second, for batches of `images`."""
    rows = []
    for column in columns:
        found = in_new_process(column, "inference", "time", options, options.repeats)
        seconds = {name: found["calls"][name]["seconds"] for name in INFERENCE}
        rows.append(
            {
                "side": column,
                "stage": "inference",
                **seconds,
                "total": sum(seconds.values()),
                "peak_bytes": found["peak_bytes"],
                "caption_tokens_per_second": settings.images * settings.tokens / seconds["captions"],
                "images_per_second": settings.images / seconds["pictures"],
                "load": found["load"],
            }
        )
    return rows


def print_stage(rows: Sequence[dict], names: Sequence[str]) -> None:
    """One line a quantity, one column a side, and how many times as long the others take."""
    ours, *others = rows if rows[0]["side"] == "jax" and len(rows) > 1 else (None, *rows)
    heads = [f"{row['side']} / jax" for row in others] if ours else []
    print(
        f"\n| {rows[0]['stage']} | "
        + " | ".join([row["side"] for row in rows] + heads)
        + " |\n"
        + "|---" * (1 + len(rows) + len(heads))
        + "|"
    )
    for name in names:
        if any(name in row for row in rows):
            values = [_shown(name, row.get(name)) for row in rows]
            ratios = (
                [f"{row[name] / ours[name]:.2f}" if name in COMPARED and ours[name] else "" for row in others]
                if ours
                else []
            )
            print(f"| {name} | " + " | ".join(values + ratios) + " |", flush=True)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("peak_bytes"):
        return f"{value / 1e6:.0f} MB"
    if name.endswith("_share"):
        return f"{value:.0%}"
    if name == "load" or name.endswith("_per_second"):
        return f"{value:.1f}"
    return f"{value:.1f} s" if "compile" in name else f"{1e3 * value:.0f} ms"


def run(options: argparse.Namespace, settings: Settings) -> None:
    """Checks, measures and prints everything."""
    sides = {"jax": COLUMNS[:1], "torch": COLUMNS[1:], "both": COLUMNS}[options.side]
    columns = [column for column in sides if options.compile or column != "torch_compiled"]
    if options.side == "both":
        compare(options)
    options.rates = in_new_process("jax", "inference", "rates", options, 0)
    print(
        f"matrices {options.rates['matrix_rate'] / 1e12:.2f} TFLOP/s in {settings.dtype}, copying "
        f"{options.rates['copy_bandwidth'] / 1e9:.1f} GB/s"
    )
    rows: list[dict] = []
    for stage in options.stages:
        rows += (
            measure_inference(columns, options, settings)
            if stage == "inference"
            else measure_stage(columns, stage, options)
        )
        print_stage(
            rows[-len(columns) :],
            (
                *PHASES,
                PREFILL,
                *INFERENCE,
                "total",
                "fastest",
                "cpu_seconds",
                "peak_bytes",
                "compile_peak_bytes",
                "compile_seconds",
                "cached_compile_seconds",
                "decoding_share",
                "denoising_share",
                "caption_tokens_per_second",
                "images_per_second",
                "load",
            ),
        )
    if options.json:
        options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(options: argparse.Namespace, settings: Settings) -> None:
    """Writes checkpoint and inputs in processes of their own, so that this one stays free of both libraries."""
    if options.checkpoint is None:
        options.checkpoint = pathlib.Path(options.place) / "checkpoint"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.mini_checkpoint", str(options.checkpoint), f"--size={options.size}"],
            check=True,
        )
    values = json.dumps(dataclasses.asdict(settings))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.unified_step",
            f"--checkpoint={options.checkpoint}",
            f"--place={options.place}",
            f"--work=inputs:{values}",
        ],
        check=True,
    )


def read_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """The command line; every size of `Settings` is an option of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=pathlib.Path, help="folder in the official layout; made if it is not given"
    )
    parser.add_argument("--size", choices=SIZES, default="mini", help="of the checkpoint that is made")
    parser.add_argument(
        "--stages", nargs="+", choices=(*STAGES, "inference"), default=[*STAGES, "inference"], help="which to time"
    )
    parser.add_argument("--side", choices=("jax", "torch", "both"), default="both")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed calls of everything, after one that compiles and one more"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="the column with torch.compile"
    )
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
        print(
            json.dumps(work(kind, *rest.split(":"), options.checkpoint, pathlib.Path(options.place), options.repeats))
        )
    else:
        with tempfile.TemporaryDirectory() as options.place:
            prepare(options, settings)
            run(options, settings)


if __name__ == "__main__":
    main()
