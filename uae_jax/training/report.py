"""`report.html` of a workdir: one self-contained page with curves, held-out scores and samples before and after each stage."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure
import numpy as np

from uae_jax.training.metrics import read_lines
from uae_jax.training.summary import read_summary

# Panel title -> metric names drawn in it, wherever a stage logged them; "*" ends a prefix.
PANELS = {
    "Training reward (cosine to the original, sampled)": ("reward",),
    "Loss": ("loss",),
    "Caption length (tokens)": ("caption_tokens", "eval/caption_tokens"),
    "Held-out scores during training": ("eval/reward", "eval/unified_score", "eval/heldout_score", "eval/fact_recall"),
    "Distance to the reference policy (KL)": ("kl",),
    "Gradient norm before clipping": ("grad_norm",),
}

# How each score is read; the page shows the sentence beside the row.
MEANINGS = {
    "reward": "what training maximises: cosine of the reward encoder between picture and reconstruction",
    "unified_score": "mean cosine over the image encoders",
    "heldout_score": "cosine of an encoder that was never a reward: catches reward hacking",
    "caption_tokens": "length of the caption; longer is not better by itself",
    "fact_recall": "share of the scene's facts that the caption states",
    "fact_precision": "share of the stated facts that are true",
    "scene_accuracy": "share of the scene's facts found again in the reconstruction",
    "true_caption_reward": "the decoder alone: the same cosine when it is given the data set's own captions",
    "true_caption_scene_accuracy": "the decoder alone: facts found again when it is given the full true captions",
    "geneval": "compositional prompts drawn correctly (mean of the tags below)",
}


def write_report(workdir: Path, *, max_samples: int = 8) -> Path:
    """Writes `workdir/report.html` from summary.json, metrics.jsonl and samples/, and returns its path.

    Samples are read from `samples/<stage>_before/samples.json` and `samples/<stage>_after/samples.json`: lists of
    {"original": file, "caption": text, "reconstruction": file, "scores": {name: number}}, files relative to that folder.

    Args:
      workdir: folder of a run; every part but summary.json may be missing.
      max_samples: pictures shown before and after each stage.

    Raises:
      FileNotFoundError: no summary.json, or a sample's picture is missing.
      ValueError: a damaged JSON file.
    """
    workdir = Path(workdir)
    summary = read_summary(workdir)
    lines = read_lines(workdir / "metrics.jsonl")
    stages = [
        {
            **stage,
            "scores": score_rows(stage["before"], stage["after"]),
            "samples": sample_rows(workdir / "samples", stage["name"], max_samples),
        }
        for stage in summary["stages"]
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("uae_jax.training", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html").render(summary=summary, stages=stages, curves=curves(lines))
    path = workdir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def score_rows(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the score table: name, meaning, both intervals, the change, and whether the intervals overlap."""
    rows = []
    for name in [*MEANINGS, *sorted((before.keys() | after.keys()) - MEANINGS.keys())]:
        old, new = (scores[name] if isinstance(scores.get(name), dict) else None for scores in (before, after))
        if old is None and new is None:
            continue
        row = {"name": name, "meaning": MEANINGS.get(name, ""), "before": old, "after": new, "change": None, "clear": False}
        if old and new:
            row["change"] = new["value"] - old["value"]
            row["clear"] = new["low"] > old["high"] or new["high"] < old["low"]
        rows.append(row)
    return rows


def sample_rows(folder: Path, stage: str, count: int) -> list[dict[str, Any]]:
    """The same pictures before and after a stage: {"before": sample or None, "after": sample or None}, images inlined."""
    sides = {when: _read_samples(folder / f"{stage}_{when}", count) for when in ("before", "after")}
    length = max(len(samples) for samples in sides.values())
    return [{when: samples[i] if i < len(samples) else None for when, samples in sides.items()} for i in range(length)]


def curves(lines: list[dict[str, Any]]) -> str:
    """`curves_figure` as a data URI of a PNG; "" when nothing was logged."""
    figure = curves_figure(lines)
    if figure is None:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _data_uri(buffer.getvalue())


def curves_figure(lines: list[dict[str, Any]]) -> matplotlib.figure.Figure | None:
    """The curves of all stages, side by side in the order they ran; None when nothing was logged.

    Args:
      lines: of `metrics.jsonl` (`metrics.read_lines`).
    """
    panels = {title: series for title, names in PANELS.items() if (series := _series(lines, names))}
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = matplotlib.figure.Figure(figsize=(12, 2.9 * rows), layout="constrained")
    starts = _stage_starts(lines)
    for index, (title, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, 2, index + 1)
        axes.set_title(title, fontsize=10)
        drawn = [(name, points) for name, points in series.items()]
        for color, (name, points) in enumerate(drawn):
            for number, (x, y) in enumerate(points):
                _draw(axes, x, y, f"C{color}", name if number == 0 and len(drawn) > 1 else None)
        if len(drawn) > 1:
            axes.legend(fontsize=8)
        _mark_stages(axes, starts)
    return figure


def _series(lines: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """name -> one (x, y) curve for each stage that logged it; x counts steps over all stages."""
    starts = _stage_starts(lines)
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name in names:
        for stage, (start, _) in starts.items():
            points = [(start + line["step"], line[name]) for line in lines if line["stage"] == stage and line.get(name) is not None]
            if points:
                found.setdefault(name, []).append(tuple(np.array(points, np.float64).T))
    return found


def _stage_starts(lines: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """stage -> (steps of all stages before it, its own last step), in the order of first appearance."""
    last: dict[str, int] = {}
    for line in lines:
        last[line["stage"]] = max(last.get(line["stage"], 0), line["step"])
    starts, total = {}, 0
    for stage, length in last.items():
        starts[stage] = total, length
        total += length
    return starts


def _draw(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str | None) -> None:
    """The values, and over 30 points or more their running mean, because rewards of single rollouts are noisy."""
    width = len(y) // 15
    smooth = width >= 2
    axes.plot(x, y, color=color, alpha=0.25 if smooth else 1.0, lw=0.8 if smooth else 1.4, marker="." if len(y) < 20 else "",
              label=None if smooth else label)  # fmt: skip
    if smooth:
        padded = np.pad(y, (width, width), mode="edge")
        mean = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")
        axes.plot(x, mean, color=color, lw=1.6, label=label)


def _mark_stages(axes: Any, starts: dict[str, tuple[int, int]]) -> None:
    for stage, (start, length) in starts.items():
        axes.axvline(start, color="0.6", lw=0.7, ls="--")
        axes.text(start + length / 2, 0.98, stage, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=7, color="0.4")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)


def _read_samples(folder: Path, count: int) -> list[dict[str, Any]]:
    path = folder / "samples.json"
    if not path.exists():
        return []
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it to write the report without these samples") from error
    return [
        {**sample, **{key: _data_uri((folder / sample[key]).read_bytes()) for key in ("original", "reconstruction")}}
        for sample in samples[:count]
    ]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
