"""The curves of a run, a figure each: metrics of the steps, held-out scores before, during and after each stage."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from cycler import cycler

Lines = Sequence[Mapping[str, Any]]
# smallest value on logarithmic axes: the KL of an unchanged policy is rounding
LOWEST = 1e-10
LIGHT: dict[Any, Any] = {}  # matplotlib's own colours
# the colours of `templates/report.html` on a dark screen
DARK: dict[Any, Any] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#16181b"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), "#c9c9c9"),
    "grid.color": "#6b6f76",
    "axes.prop_cycle": cycler(
        color=("#6db3f2", "#ffb05c", "#7fd491", "#ff8a80", "#c3a5f0", "#d3a68f", "#f2a3d4", "#b8bcc2")
    ),
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
      title: above the plot.
      steps: metrics of train steps, shown as lines.
      scores: held-out scores, shown as points; "name*" stands for all whose name begins so.
      log: whether the axis is logarithmic.
      unless: stages that report this metric are left out.
    """

    title: str
    steps: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    log: bool = False
    unless: str = ""


PANELS = (
    Panel("Reward: cosine of the reward encoder", ("reward",), ("reward",)),
    Panel("Image encoders: unified (mean of all), heldout (never a reward)", (), ("unified_score", "heldout_score")),
    Panel(
        "Captions: share of the facts stated, share of the stated that is true", (), ("fact_recall", "fact_precision")
    ),
    Panel("Questions answered right: all, and by category", (), ("understanding*",)),
    Panel(
        "Images: facts found in the reconstruction, prompts generated right",
        (),
        ("scene_accuracy", "true_caption_scene_accuracy", "geneval"),
    ),
    Panel("Caption length (tokens)", ("caption_tokens",), ("caption_tokens",)),
    Panel("Captions truncated at the length limit; share of repetitions", ("truncated_fraction", "repetition")),
    Panel("Distance to the reference policy (KL)", ("kl",), log=True),
    Panel("Gradient norm before clipping", ("grad_norm",), log=True),
    # the loss of policy gradients is always near 0
    Panel("Loss of the supervised stages", ("loss",), unless="truncated_fraction"),
)


def curve_figures(
    lines: Lines, stages: Sequence[Mapping[str, Any]] = (), *, dark: bool = False
) -> list[tuple[str, matplotlib.figure.Figure]]:
    """One figure a panel, with its title; the stages side by side in equal widths. None for empty logs.

    Args:
      lines: of `metrics.jsonl` (`metrics.read_lines`).
      stages: of `summary.json`, for the scores before and after each stage.
      dark: light lines on a dark ground.
    """
    spans = stage_spans(lines)
    found = [(panel, _steps(lines, spans, panel), _scores(lines, spans, stages, panel)) for panel in PANELS]
    look = DARK if dark else LIGHT
    with matplotlib.rc_context(look):
        return [
            (panel.title, _figure(panel, steps, scores, lines, spans))
            for panel, steps, scores in found
            if steps or scores
        ]


def _figure(
    panel: Panel,
    steps: Mapping[str, list[tuple[np.ndarray, np.ndarray]]],
    scores: Mapping[str, list[tuple[float, ...]]],
    lines: Lines,
    spans: Mapping[str, int],
) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(6.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    if panel.log:
        axes.set_yscale("log")
    cycle = itertools.cycle(matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])
    colors = dict(zip(dict.fromkeys((*steps, *scores)), cycle))
    for name, curves in steps.items():
        label = f"{name} (training)" if panel.scores else name
        for number, (x, y) in enumerate(curves):
            _plot_steps(axes, x, y, colors[name], label if number == 0 else None)
    for name, points in scores.items():
        _plot_scores(axes, points, colors[name], f"{name} (held out)" if panel.steps else name)
    if len(steps) + len(scores) > 1:
        figure.legend(fontsize=8, frameon=False, ncols=2, loc="outside lower center")
    _mark_stages(axes, spans)
    _mark_trips(axes, lines, spans)
    return figure


def stage_spans(lines: Lines) -> dict[str, int]:
    """Stage to its last step, in the order of first appearance; stage number n is between n and n + 1 on the axis."""
    last: dict[str, int] = {}
    for line in lines:
        last[line["stage"]] = max(last.get(line["stage"], 1), line["step"])
    return last


def _at(spans: Mapping[str, int], stage: str, step: int) -> float:
    return list(spans).index(stage) + step / spans[stage]


def _steps(lines: Lines, spans: Mapping[str, int], panel: Panel) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Metric to one (x, y) curve for each stage with that metric; without zeros and rounding on a logarithmic axis."""
    skipped = {line["stage"] for line in lines if panel.unless and panel.unless in line}
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name in panel.steps:
        for stage in spans:
            points = [
                (_at(spans, stage, line["step"]), line[name])
                for line in lines
                if line["stage"] == stage and line.get(name) is not None and (line[name] > LOWEST or not panel.log)
            ]
            if points and stage not in skipped:
                x, y = np.array(points, np.float64).T
                found.setdefault(name, []).append((x, y))
    return found


def _scores(
    lines: Lines, spans: Mapping[str, int], stages: Sequence[Mapping[str, Any]], panel: Panel
) -> dict[str, list[tuple[float, ...]]]:
    """Score to points (x, value, low, high) in order; points during a stage have no interval (low = high = nan)."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for name in _named(lines, stages, panel.scores):
        points = [
            (_at(spans, line["stage"], line["step"]), line[f"eval/{name}"], np.nan, np.nan)
            for line in lines
            if line.get(f"eval/{name}") is not None
        ]
        for stage in stages:
            if stage["name"] not in spans:
                continue
            begin = list(spans).index(stage["name"])
            ends = {begin + 1: stage["after"]} | ({begin: stage["before"]} if begin == 0 or stage is stages[0] else {})
            points += [
                (x, s["value"], s["low"], s["high"])
                for x, side in ends.items()
                if isinstance(s := side.get(name), dict)
            ]
        if points:
            found[name] = sorted(points)
    return found


def _named(lines: Lines, stages: Sequence[Mapping[str, Any]], patterns: Sequence[str]) -> list[str]:
    """The names of scores, with those that a pattern stands for."""
    known = [name.removeprefix("eval/") for line in lines for name in line if name.startswith("eval/")]
    known += [name for stage in stages for side in ("before", "after") for name in stage[side]]
    listed: list[str] = []
    for name in patterns:
        listed += [name] if not name.endswith("*") else [found for found in known if found.startswith(name[:-1])]
    return list(dict.fromkeys(listed))


def _plot_steps(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str | None) -> None:
    """The values, and from 30 points on their running mean, because rewards of single rollouts are noisy."""
    width = len(y) // 15
    smooth = width >= 2
    axes.plot(
        x,
        y,
        color=color,
        alpha=0.25 if smooth else 1.0,
        lw=0.8 if smooth else 1.4,
        marker="." if len(y) < 20 else "",
        label=None if smooth else label,
    )
    if smooth:
        padded = np.pad(y, (width, width), mode="edge")
        mean = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")
        axes.plot(x, mean, color=color, lw=1.6, label=label)


def _plot_scores(axes: Any, points: Sequence[tuple[float, ...]], color: str, label: str) -> None:
    """Filled points with intervals before and after stages, hollow points during stages, joined by a thin line."""
    x, y, low, high = np.array(points, np.float64).T
    ends = np.isfinite(low)
    axes.plot(x, y, color=color, lw=0.9, ls=":")
    axes.plot(x[~ends], y[~ends], color=color, ls="", marker="o", ms=4, mfc=matplotlib.rcParams["axes.facecolor"])
    reach = np.maximum([y - low, high - y], 0)[:, ends]
    axes.errorbar(
        x[ends], y[ends], yerr=reach, color=color, ls="", marker="o", ms=4.5, capsize=2.5, lw=1.2, label=label
    )


def _mark_stages(axes: Any, spans: Mapping[str, int]) -> None:
    for number, stage in enumerate(spans):
        if number % 2:
            axes.axvspan(number, number + 1, color="0.5", alpha=0.07, lw=0)
        axes.text(
            number + 0.5,
            1.01,
            stage,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=matplotlib.rcParams["text.color"],
        )
    axes.set_xlim(-0.03, len(spans) + 0.03)
    axes.set_xticks([number + 1 for number in range(len(spans))], [f"step {length}" for length in spans.values()])
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _mark_trips(axes: Any, lines: Lines, spans: Mapping[str, int]) -> None:
    for line in lines:
        if "guard" in line:
            tripped, restored = (
                _at(spans, line["stage"], step) for step in (line["step"], line["guard"]["restored_step"])
            )
            axes.axvspan(restored, tripped, color="#b3261e", alpha=0.10, lw=0)
            axes.axvline(tripped, color="#b3261e", lw=1.2)
