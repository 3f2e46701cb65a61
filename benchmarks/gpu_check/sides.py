"""Whole steps and their phases, of this package and of compiled PyTorch, on random weights of one size.

As `benchmarks.unified_step` times them, with its settings and its calls. Its checkpoint of 13 GB is left out: each side
makes its weights on the card, since reading them in every process would take longer than all that is timed.
"""

import dataclasses
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks import mini_checkpoint
from benchmarks.measure import time_call
from benchmarks.step_settings import PREFILL, Inputs, Settings
from benchmarks.unified_step import import_libraries, open_side

STAGES = ("gen_for_und", "und_for_gen")
SETTINGS = {
    "full": Settings(image_size=512, dtype="bfloat16"),
    "small": Settings(images=2, group=2, tokens=5, steps=2, window=1, image_size=64, lora_rank=4),
}
REPEATS = {"full": 3, "small": 1}
# the whole step comes first, then what its shares need
FIRST = ("sampling", PREFILL, "denoising", "update", "condition", "decoding", "reward")


def column_of(side: str, size: str) -> str:
    """The column of `unified_step`. A dry run leaves torch.compile out, which takes longer than all the rest of it."""
    return "jax" if side == "phases" else "torch_compiled" if size == "full" else "torch"


def prepared(column: str, size: str, work: pathlib.Path) -> tuple[pathlib.Path, Inputs]:
    """The folder of configs without weights, and inputs that all processes share; made by the first that needs them."""
    folder, place = work / "model", work / "inputs"
    if not (work / "model_is_whole").exists():
        elsewhere("write_configs", size, folder)
        (work / "model_is_whole").touch()
    if not (place / "inputs.npz").exists() or Inputs.load(place).settings != SETTINGS[size]:
        if column == "jax":
            make_inputs(size, folder, place)
        else:
            elsewhere("make_inputs", size, folder, place)
    return folder, Inputs.load(place)


def elsewhere(function: str, size: str, *folders: pathlib.Path) -> None:
    """Calls `write_configs` or `make_inputs` in a process of its own, which jax and torch are not to share."""
    code = f"from benchmarks.gpu_check import sides; sides.{function}(sys.argv[1], *map(pathlib.Path, sys.argv[2:]))"
    subprocess.run([sys.executable, "-c", f"import pathlib, sys; {code}", size, *map(str, folders)], check=True)


def write_configs(size: str, folder: pathlib.Path) -> None:
    """The model's folder without a weight, by transformers and diffusers."""
    mini_checkpoint.write_configs(folder, mini_checkpoint.SIZES[size])


def make_inputs(size: str, folder: pathlib.Path, place: pathlib.Path) -> None:
    """Pictures, prompts, captions and noise."""
    from benchmarks import jax_side

    jax_side.make_inputs(folder, SETTINGS[size]).save(place)


def run(side: str, size: str, stage: str, work: pathlib.Path, until: float, report: Callable[[dict], None]) -> None:
    """Times one stage's calls, the most valuable first.

    Args:
      side: `phases` for this package, `torch` for the other.
      size: `full` or `small`.
      stage: of `STAGES`.
      work: folder that the processes share.
      until: Unix time; calls that would probably end after it are left out.
      report: keeps the figures so far.
    """
    column = column_of(side, size)
    import_libraries(column)
    folder, inputs = prepared(column, size, work)
    model = open_side(column, folder, inputs, stage)
    figures = {"side": column, "settings": dataclasses.asdict(inputs.settings), "left_out": []}
    began, total = time.time(), time_call(model.step(), REPEATS[size])
    figures |= {
        "total": total["seconds"],
        "fastest": total["fastest"],
        "peak_bytes": model.device_peak(),
        "compile_seconds": max(total["first"] - total["seconds"], 0.0),
    }
    report(figures)
    if column == "jax":
        figures["work"] = model.work()
    calls, longest = model.phases(), time.time() - began
    for name in sorted(calls, key=FIRST.index):
        if time.time() + longest / 2 > until:  # a phase is compiled anew, and is less than the step
            figures["left_out"].append(name)
            continue
        figures[name] = time_call(calls[name], REPEATS[size])["seconds"]
        report(figures)
    report(figures)
