"""`gpu_check.json` with all figures, and `gpu_check.md`, which a person reads (`page`)."""

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu_check.page import STAGES, figures_of, page
from benchmarks.unified_step import shares
from uae_jax.files.json_files import read_json, write_json
from uae_jax.files.whole import write_bytes

JSON, PAGE, PREVIOUS = "gpu_check.json", "gpu_check.md", "gpu_check.previous.json"


def open_report(folder: pathlib.Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """The report of earlier runs of the same identity, or a new one.

    A file of another identity is kept as `gpu_check.previous.json`.

    Args:
      folder: of the files; it need not be there.
      identity: of `card.identity`.

    Raises:
      ValueError: the file there is not JSON.
    """
    if (folder / JSON).exists():
        found = read_json(folder, JSON)
        if found.get("identity") == dict(identity):
            return found
        (folder / JSON).replace(folder / PREVIOUS)
    return {"identity": dict(identity), "runs": [], "derived": {}, "parts": {}}


def write_report(folder: pathlib.Path, report: dict[str, Any]) -> None:
    """Writes both files, with what follows from the figures of several parts."""
    report["derived"] = derive(report["parts"])
    write_json(folder / JSON, report)
    write_bytes(folder / PAGE, page(report).encode())


def derive(parts: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """What follows from several parts, by stage.

    Returns:
      `of_peak`, `of_matrix_rate`: model FLOPs (none recomputed) of the median step over what the card could do by its
        data sheet, and by its measured rate.
      `of_compiler`, `of_estimate`: the measured peak of memory over the compiler's, and over the estimate.
      `denoising_share`, `decoding_share`: see `unified_step.shares`.
      `times_as_fast`: seconds of a whole step of compiled PyTorch over those of this package; `times_as_fast_eager` in
        a dry run, where PyTorch is not compiled.
    """
    device, found = figures_of(parts, "device"), {}
    for stage in STAGES:
        ours, theirs = (figures_of(parts, f"{kind}:{stage}") for kind in ("phases", "torch"))
        row = _utilisation(figures_of(parts, f"steps:{stage}"), device.get("matrix_rate"))
        if {"work", "sampling", "denoising"} <= set(ours) and "matrix_rate" in device:
            row |= shares(ours, ours["work"], device)
        if "total" in ours and "total" in theirs:
            name = "times_as_fast" if theirs["side"] == "torch_compiled" else "times_as_fast_eager"
            row[name] = theirs["total"] / ours["total"]
        if row:
            found[stage] = row
    return found


def _utilisation(steps: Mapping[str, Any], matrix_rate: float | None) -> dict[str, float]:
    """Of a stage's step: of the card's rates, and of the memory that was planned."""
    row = {}
    for name, rate in (("of_peak", steps.get("peak_flops")), ("of_matrix_rate", matrix_rate)):
        if rate and "seconds" in steps:
            row[name] = steps["model_flops"] / steps["seconds"] / rate
    for name in ("compiler", "estimate"):
        if steps.get("peak_bytes") and name in steps:
            row[f"of_{name}"] = steps["peak_bytes"] / steps[name]["peak"]
    return row
