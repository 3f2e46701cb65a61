"""`summary.json`: what a run did, with an interval on every score."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uae_jax.files.json_files import write_json

PACKAGES = ("uae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def interval(values: Sequence[float], resamples: int = 2000) -> dict[str, float | int]:
    """Mean of one score per picture, with a 95 % percentile bootstrap interval over pictures.

    Args:
      values: [n] scores; order does not matter to the mean, and the resampling seed is fixed, so equal input gives
        equal output.
      resamples: bootstrap draws.

    Returns:
      {"value", "n", "low", "high"}, low <= value <= high in all but pathological cases; equal for n = 1.

    Raises:
      ValueError: no values, or one that is not finite.
    """
    scores = np.asarray(values, np.float64).reshape(-1)
    if not scores.size or not np.isfinite(scores).all():
        raise ValueError(
            f"a score needs finite values for at least one picture, got {scores.size} values, "
            f"{int((~np.isfinite(scores)).sum())} not finite"
        )
    rng = np.random.default_rng(0)
    means = np.array([scores[rng.integers(0, scores.size, scores.size)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"value": float(scores.mean()), "n": int(scores.size), "low": float(low), "high": float(high)}


def intervals(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | int]]:
    """`interval` of every score: {"reward": [n] values, ...} -> {"reward": {"value", "n", "low", "high"}, ...}."""
    return {name: interval(values) for name, values in scores.items()}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of Python and of packages, by default of what decides the numbers."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    return found


def device_name() -> str:
    """Such as "4 x TPU v6 lite" or "1 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def write_summary(workdir: Path, *, preset: str, seed: int, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Writes `workdir/summary.json` and returns it. `seconds` of the run is the sum over stages, evaluation included.

    Args:
      workdir: the training folder.
      preset: name of the configuration.
      seed: root seed of the run.
      stages: one mapping a finished stage, in order, as `StageResult.record()` gives it: name, steps, seconds (training
        only), wall_seconds (with evaluation), before and after ({score: `interval`}).
    """
    summary = {
        "preset": preset,
        "seed": int(seed),
        "device": device_name(),
        "versions": versions(),
        "seconds": round(sum(stage["wall_seconds"] for stage in stages), 3),
        "stages": [dict(stage) for stage in stages],
    }
    if jax.process_index() == 0:
        write_json(Path(workdir) / "summary.json", summary)
    return summary


def read_summary(workdir: Path) -> dict[str, Any]:
    """The summary of a workdir.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON.
    """
    path = Path(workdir) / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; train with --workdir={workdir} first")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the training command again to rewrite it") from error
