"""Shared by the benchmark commands: the action `summary`, reports, refusals, and scores by group."""

import argparse
import collections
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uae_jax.files.json_files import write_json
from uae_jax.files.paths import to_path


def add_summary(actions: Any, what: str, argument: str, files: str, run: Callable[[argparse.Namespace], None]) -> None:
    """Adds the action `summary`: the file with results, and --output.

    Args:
      actions: of `add_subparsers`.
      what: help of the action.
      argument: name of the file among the options.
      files: help of the file.
      run: the action.
    """
    summary = actions.add_parser("summary", help=what)
    summary.add_argument(argument, type=to_path, help=files)
    summary.add_argument("--output", type=to_path, help="JSON file for the scores")
    summary.set_defaults(run=run)


def tell(report: str, warnings: Sequence[str], scores: Any = None, output: pathlib.Path | None = None) -> None:
    """Prints a report and its warnings; writes the scores as JSON if there is an output."""
    print("\n".join([report, *(f"note: {warning}" for warning in warnings)]))
    if output:
        write_json(output, scores)


def check_folder(folder: pathlib.Path, action: str) -> None:
    """Raises FileNotFoundError for a folder that does not exist.

    Args:
      folder: written by an action.
      action: the action's words on the command line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give the --out of `{action}`")


def refuse(problems: Sequence[str], what: str, shown: int = 20) -> None:
    """Prints problems, one a line; does nothing without problems.

    Raises:
      ValueError: there are problems.
    """
    for problem in problems[:shown]:
        print(problem)
    if len(problems) > shown:
        print(f"... and {len(problems) - shown} more")
    if problems:
        raise ValueError(f"{what} has {len(problems)} problem{'s' if len(problems) > 1 else ''}, listed above")


def grouped_scores(records: Iterable[tuple[str, str, float]], resamples: int = 2000) -> dict[str, Any]:
    """Mean score of every group, and "overall", the mean of the group means.

    The 95 % intervals are percentile bootstraps over the prompts of each group, because images of one prompt are not
    independent.

    Args:
      records: (group, prompt, score), one per image.
      resamples: bootstrap samples; the seed is fixed.

    Returns:
      {"overall": {"value", "low", "high", "n", "prompts"}, "groups": {group: the same}}, groups in the order of their
      first record; `n` counts images.

    Raises:
      ValueError: no records.
    """
    tallies: dict[str, dict[str, list[float]]] = {}
    for group, prompt, score in records:
        tallies.setdefault(group, {}).setdefault(prompt, []).append(float(score))
    if not tallies:
        raise ValueError("there are no results to summarise")
    rng = np.random.default_rng(0)
    groups, draws = {}, []
    for group, prompts in tallies.items():
        sums, counts = (
            np.array([measure(scores) for scores in prompts.values()], np.float64) for measure in (sum, len)
        )
        chosen = rng.integers(0, len(prompts), (resamples, len(prompts)))
        draws.append(sums[chosen].sum(-1) / counts[chosen].sum(-1))
        groups[group] = _interval(sums.sum() / counts.sum(), draws[-1], int(counts.sum()), len(prompts))
    overall = _interval(
        float(np.mean([score["value"] for score in groups.values()])),
        np.mean(draws, axis=0),
        sum(score["n"] for score in groups.values()),
        sum(score["prompts"] for score in groups.values()),
    )
    return {"overall": overall, "groups": groups}


def _interval(value: float, draws: np.ndarray, n: int, prompts: int) -> dict[str, float | int]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high), "n": n, "prompts": prompts}


def table(scores: Mapping[str, Any], title: str) -> str:
    """The overall score and every group as lines of text, in percent with intervals and counts."""
    rows = {title: scores["overall"], **scores["groups"]}
    width = max(map(len, rows))
    return "\n".join(
        f"{name:{width}}  {100 * row['value']:6.2f} %  [{100 * row['low']:.2f}, {100 * row['high']:.2f}]  "
        f"{row['n']} images of {row['prompts']} prompts"
        for name, row in rows.items()
    )


def uneven(counts: Mapping[str, int]) -> list[str]:
    """A sentence on the prompts whose number of images is not the usual one; [] without such prompts."""
    if not counts:
        return []
    usual = collections.Counter(counts.values()).most_common(1)[0][0]
    other = [prompt for prompt, count in counts.items() if count != usual]
    return [f"{len(other)} prompts do not have {usual} images as the others have, such as {other[0]}"] if other else []
