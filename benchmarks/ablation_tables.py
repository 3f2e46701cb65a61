"""Tables and plots of finished ablations, for `benchmarks.ablations`."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import matplotlib.figure
import numpy as np

from benchmarks.documents import replace_block
from configs import ablations

RECORD = "arm.json"
KINDS = ("background", "position", "size", "colour", "shape")
# heading -> score; the encoders are named as what they are, whichever of them an arm's reward was
_SEEN = {"CLIP": "reward", "DINOv2": "heldout_score", "scene accuracy": "scene_accuracy"}
_SAID = {"tokens": "caption_tokens", "cut": "truncated", "recall": "fact_recall", "precision": "fact_precision"}
_DRAWN = {"scene accuracy, true captions": "true_caption_scene_accuracy"}
COLUMNS = {
    "und": _SEEN | _SAID,
    "gen": _SEEN | _DRAWN | {"geneval": "geneval"},
    "both": _SEEN | _SAID | _DRAWN | {"geneval": "geneval"},
}
PANELS = {
    "und": ("fact_recall", "fact_precision", "scene_accuracy", "caption_tokens"),
    "gen": ("scene_accuracy", "true_caption_scene_accuracy", "heldout_score", "geneval"),
    "both": ("fact_recall", "scene_accuracy", "true_caption_scene_accuracy", "geneval"),
}
INTRODUCTION = """Held-out scenes of the built-in model on two cores. With one seed: value [95 % interval over scenes].
With more: mean over seeds (lowest to highest). CLIP and DINOv2 are cosines of drawing and original under these
encoders, whichever was the arm's reward; scene accuracy is the share of the original's facts that the exact checker
finds in the drawing, never a reward. Tokens, recall and precision are of captions, "cut" the share of them that reach
the longest length; "which facts" is the recall of background / place / size / colour / shape. The row "before" is what
the reference row started from."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished arm with one seed: scores `before` its first stage and `after` its last, and `seconds` of training
    steps.
    """

    before: dict
    after: dict
    seconds: float


def folder_of(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Of one run."""
    return workdir / name / f"seed_{seed}"


def read_result(workdir: pathlib.Path, name: str, seed: int) -> Result | None:
    """The result of a run, None when it is not finished or makes no scores.

    Raises:
      ValueError: its summary is damaged.
    """
    folder = folder_of(workdir, name, seed)
    record = folder / RECORD
    if not record.exists() or not json.loads(record.read_text())["finished"] or not (folder / "summary.json").exists():
        return None
    try:
        stages = json.loads((folder / "summary.json").read_text())["stages"]
        return Result(stages[0]["before"], stages[-1]["after"], sum(stage["seconds"] for stage in stages))
    except (KeyError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / 'summary.json'} is damaged ({error!r}); delete {record} to run the arm again"
        ) from error


def headline(workdir: pathlib.Path, name: str, seed: int) -> str:
    """What a run found, in a few words."""
    result = read_result(workdir, name, seed)
    if result is None:
        return "done"
    shown = [key for key in ("fact_recall", "scene_accuracy", "geneval") if key in result.after]
    return ", ".join(f"{key} {result.before[key]['value']:.3f} -> {result.after[key]['value']:.3f}" for key in shown)


def cell(scores: Sequence[dict]) -> str:
    """A score of one seed with its interval over pictures, or of several with their range; empty without any."""
    if not scores:
        return ""
    values = [score["value"] for score in scores]
    digits = 1 if max(map(abs, values)) >= 2 else 3
    low, high = (scores[0]["low"], scores[0]["high"]) if len(scores) == 1 else (min(values), max(values))
    text = f"{np.mean(values):.{digits}f}"
    return (
        f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
        if len(scores) == 1
        else f"{text} ({low:.{digits}f} to {high:.{digits}f})"
    )


def which_facts(scores: Sequence[dict]) -> str:
    """Mean recall of each kind of fact."""
    names = [f"fact_recall_{kind}" for kind in KINDS]
    if not scores or any(name not in score for score in scores for name in names):
        return ""
    return " / ".join(f"{np.mean([score[name]['value'] for score in scores]):.2f}" for name in names)


def row(label: str, scores: Sequence[dict], seconds: Sequence[float], columns: dict[str, str]) -> str:
    """A line of a table."""
    cells = [cell([score[name] for score in scores if name in score]) for name in columns.values()]
    if "fact_recall" in columns.values():
        cells.append(which_facts(scores))
    time = f"{np.mean(seconds):.0f}" if seconds else ""
    return f"| {' | '.join([label, str(len(scores) or ''), *cells, time])} |"


def topic_rows(topic: str, names: Sequence[str], same_as: Callable[[str], str]) -> dict[str, str]:
    """Arm to label of a topic's table, its reference first, and that once; arms that make no scores are left out."""
    reference = ablations.TOPICS[topic].reference
    mine = [name for name in names if ablations.ARMS[name].topic == topic and not ablations.ARMS[name].bootstraps]
    if not set(mine) - {reference}:
        return {}
    equal = [ablations.ARMS[name].label for name in mine if name != reference and same_as(name) == same_as(reference)]
    own = ablations.ARMS[reference].label if ablations.ARMS[reference].topic == topic else "the recipe"
    label = f"{equal[0]} (the recipe)" if equal else own
    return {reference: label} | {
        name: ablations.ARMS[name].label for name in mine if same_as(name) != same_as(reference)
    }


def topic_section(
    topic: str, results: dict[str, dict[int, Result]], rows: dict[str, str], seeds: Sequence[int], image: str
) -> list[str]:
    """Heading, question, table, plot and what is missing."""
    about = ablations.TOPICS[topic]
    columns = COLUMNS[about.scores]
    heads = ["arm", "seeds", *columns, *(["which facts"] if "fact_recall" in columns.values() else []), "train s"]
    lines = [f"### {about.title}", "", about.question, "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines.append(row("before", [result.before for result in results[about.reference].values()], [], columns))
    for name, label in rows.items():
        found = list(results[name].values())
        lines.append(row(label, [result.after for result in found], [result.seconds for result in found], columns))
    missing = [f"`{name}` seed {seed}" for name in rows for seed in seeds if seed not in results[name]]
    lines += ["", f"![{about.title}]({image})", ""] if image else [""]
    return lines + ([f"Missing: {', '.join(missing)}.", ""] if missing else [])


def plot(topic: str, results: dict[str, dict[int, Result]], rows: dict[str, str]) -> matplotlib.figure.Figure | None:
    """A panel a score, a row an arm: a point a seed, the mean, and with one seed the interval; None without results."""
    about = ablations.TOPICS[topic]
    with_results = [name for name in rows if results[name]]
    if not with_results:
        return None
    panels = PANELS[about.scores]
    figure = matplotlib.figure.Figure(
        figsize=(2.6 + 2.1 * len(panels), 1.0 + 0.3 * len(with_results)), layout="constrained"
    )
    for number, score in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for height, name in enumerate(with_results):
            found = [result.after[score] for result in results[name].values() if score in result.after]
            if found:
                _points(axes, height, found, "C3" if name == about.reference else "C0")
        axes.set_yticks(range(len(with_results)), [rows[name] for name in with_results] if number == 0 else [])
        axes.set_ylim(len(with_results) - 0.5, -0.5)
        axes.set_title(score, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, axis="x")
    return figure


def _points(axes, height: int, found: Sequence[dict], color: str) -> None:
    values = [score["value"] for score in found]
    low, high = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
    axes.plot([low, high], [height, height], color=color, lw=1)
    axes.plot(values, [height] * len(values), ".", color=color, ms=4, alpha=0.6)
    axes.plot([np.mean(values)], [height], "o", color=color, ms=5)


def write_page(
    page: pathlib.Path,
    workdir: pathlib.Path,
    names: Sequence[str],
    seeds: Sequence[int],
    same_as: Callable[[str], str] = lambda name: name,
) -> int:
    """Writes tables into a page and plots into `images/` beside it; what is written by hand stays.

    Args:
      page: Markdown file; made if absent.
      workdir: of the runs.
      names: arms that are shown.
      seeds: that are wanted.
      same_as: the arm whose runs an arm reads.

    Returns:
      The number of runs that are missing.
    """
    text = page.read_text() if page.exists() else ""
    replace_block(text, "ablations", "")  # a page that cannot be written is refused before any plot
    results = {name: {} for name in ablations.ARMS}
    for name in results:
        for seed in seeds:
            if (found := read_result(workdir, same_as(name), seed)) is not None:
                results[name][seed] = found
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines, shown = (
        [
            "## Ablations and controls",
            "",
            INTRODUCTION,
            "",
            "`python -m benchmarks.ablations --workdir=...` makes and continues them.",
            "",
        ],
        set(),
    )
    for topic in ablations.TOPICS:
        rows = topic_rows(topic, names, same_as)
        if not rows:
            continue
        shown |= set(rows)
        figure, image = plot(topic, results, rows), ""
        if figure is not None:
            image = f"images/ablations_{topic}.png"
            figure.savefig(page.parent / image, dpi=80)
        lines += topic_section(topic, results, rows, seeds, image)
    fresh = page.with_name(f".{page.name}.tmp")
    fresh.write_text(replace_block(text, "ablations", "\n".join(lines)))
    fresh.replace(page)
    return sum(seed not in results[name] for name in {same_as(name) for name in shown} for seed in seeds)
