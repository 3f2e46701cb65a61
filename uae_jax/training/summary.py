"""`summary.json`: the stages of a run and their scores, each with an interval."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from uae_jax.files.json_files import write_json
from uae_jax.files.paths import to_path

PACKAGES = ("uae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def interval(values: ArrayLike, resamples: int = 2000) -> dict[str, float | int]:
    """Mean of one score per image, with a 95 % percentile bootstrap interval over images.

    Args:
      values: [n] scores. The resampling seed is fixed, so equal input gives equal output.
      resamples: number of bootstrap samples.

    Returns:
      {"value", "n", "low", "high"}; low <= value <= high except in pathological cases, and equal for n = 1.

    Raises:
      ValueError: no values, or a non-finite value.
    """
    scores = np.asarray(values, np.float64).reshape(-1)
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"a score needs finite values for at least one image, got {scores.size} values, "
            f"{int((~np.isfinite(scores)).sum())} non-finite"
        )
    rng = np.random.default_rng(0)
    means = np.array([scores[rng.integers(0, scores.size, scores.size)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(scores.mean()), "n": int(scores.size), "low": float(low), "high": float(high)}


def intervals(scores: Mapping[str, ArrayLike]) -> dict[str, dict[str, float | int]]:
    """`interval` of every score: {"reward": [n] values, ...} -> {"reward": {"value", "n", "low", "high"}, ...}."""
    return {name: interval(values) for name, values in scores.items()}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of Python and of packages, by default those that determine the numbers."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


def device_name() -> str:
    """Number and kind of the devices, such as "4 x TPU v6 lite" or "1 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def begun(workdir: Path) -> float:
    """When the run in a workdir began, in seconds of Unix time: noted in `begun.json` at its first start.

    Raises:
      ValueError: the note is damaged.
    """
    path = to_path(workdir) / "begun.json"
    if not path.exists():
        if jax.process_index() == 0:
            write_json(path, {"unix_seconds": round(time.time(), 3)})
        return time.time()
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["unix_seconds"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and goodput counts from now") from error


def goodput(stages: Sequence[Mapping[str, Any]], elapsed: float) -> float:
    """The share of a run's time that went into steps which count.

    The rest are imports, reading, scores, saves, exports, steps that were lost and done again, and the time in which
    the run stood still.

    Args:
      stages: as in `write_summary`.
      elapsed: seconds since the run began; at least those that the stages took, if the clock went back.
    """
    whole = max(elapsed, sum(stage["wall_seconds"] for stage in stages))
    return round(sum(stage["seconds"] for stage in stages) / whole, 4) if whole else 0.0


def write_summary(
    workdir: Path,
    *,
    preset: str,
    seed: int,
    stages: Sequence[Mapping[str, Any]],
    data: Sequence[Mapping[str, Any]] = (),
    elapsed: float = 0.0,
) -> dict[str, Any]:
    """Writes `workdir/summary.json` and returns its content; `seconds` is the sum over stages, with evaluation.

    Args:
      workdir: the training folder.
      preset: name of the configuration.
      seed: root seed of the run.
      stages: one mapping per finished stage, in order, from `StageResult.record()`: name, steps, seconds (training
        only), wall_seconds (with evaluation), before and after ({score: `interval`}).
      data: one mapping for each folder of images that was checked, with the counts of what was left out.
      elapsed: seconds since the run began, for `goodput`.
    """
    summary = {
        "preset": preset,
        "seed": int(seed),
        "device": device_name(),
        "versions": versions(),
        "seconds": round(sum(stage["wall_seconds"] for stage in stages), 3),
        "stages": [dict(stage) for stage in stages],
        "goodput": goodput(stages, elapsed),
    }
    if data:
        summary["data"] = [dict(folder) for folder in data]
    if jax.process_index() == 0:
        write_json(to_path(workdir) / "summary.json", summary)
    return summary


def read_summary(workdir: Path) -> dict[str, Any]:
    """The summary of a workdir.

    Raises:
      FileNotFoundError: no summary.
      ValueError: the summary is not JSON.
    """
    path = to_path(workdir) / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; train with --workdir={workdir} first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); the training command writes the summary again") from error
