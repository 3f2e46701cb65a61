"""Tables and the figure of finished arms, for `benchmarks.second_claim`.

A result is the score of every text of an arm by seed. Differences are paired by text. Intervals are over seeds.
"""

import pathlib
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
from scipy import stats

STARTS = ("before", "after")
SCORES = {
    "true_caption_scene_accuracy": "facts of true captions drawn",
    "geneval": "unseen short prompts drawn right",
    "geneval_exact": "the same, and nothing else drawn",
}
MAIN = tuple(SCORES)[:2]
BASELINES = ("none", "matching", "shuffled")
NAMES = {
    "none": "no training",
    "flow_grpo": "Flow-GRPO",
    "shuffled": "Flow-GRPO, shuffled rewards",
    "matching": "flow matching",
    "joint": "joint update",
}

# (captioner, decoder) to seed to score to values of all texts
Results = Mapping[tuple[str, str], Mapping[int, Mapping[str, np.ndarray]]]


def interval(means: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds, and both ends of its 95 % interval by Student's t; NaN for a single seed."""
    mean, count = float(np.mean(means)), len(means)
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, count - 1) * np.std(means, ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def over_seeds(means: Sequence[float]) -> str:
    """Mean over seeds with its interval; without one for a single seed, empty for none."""
    if not len(means):
        return ""
    mean, low, high = interval(means)
    return f"{mean:.3f}" if np.isnan(low) else f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def difference(means: Sequence[float]) -> str:
    """As `over_seeds`, in bold where the interval leaves zero out."""
    _, low, high = interval(means) if len(means) else (0.0, float("nan"), float("nan"))
    text = over_seeds(means)
    return f"**{text}**" if low > 0 or high < 0 else text


def paired(arm: Mapping[int, Mapping], base: Mapping[int, Mapping], score: str) -> list[float]:
    """The mean difference of two arms, for each seed that has both."""
    return [float((arm[seed][score] - base[seed][score]).mean()) for seed in arm if seed in base]


def named(arm: str) -> str:
    """An arm in words."""
    return NAMES.get(arm, arm)


def scores_table(found: Results, arms: Sequence[str]) -> str:
    """Markdown: both main scores of every arm, with either captioner."""
    heads = [f"{SCORES[score]}, {start} gen_for_und" for score in MAIN for start in STARTS]
    lines = ["| decoder | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for arm in arms:
        cells = [means_of(found[start, arm], score) for score in MAIN for start in STARTS]
        lines.append(f"| {named(arm)} | " + " | ".join(map(over_seeds, cells)) + " |")
    return "\n".join(lines)


def means_of(runs: Mapping[int, Mapping], score: str) -> list[float]:
    """The mean over texts, for each seed."""
    return [float(values[score].mean()) for values in runs.values()]


def tables(found: Results, arms: Sequence[str]) -> str:
    """Markdown: all scores of every arm, differences to the baselines, and those of `after` to `before`."""
    wide = " | ".join(SCORES.values())
    lines = [f"| captioner | decoder | seeds | {wide} |", "|---" * (3 + len(SCORES)) + "|"]
    for start in STARTS:
        for arm in arms:
            runs = found[start, arm]
            cells = [over_seeds(means_of(runs, score)) for score in SCORES]
            lines.append(f"| {start} gen_for_und | {named(arm)} | {len(runs)} | " + " | ".join(cells) + " |")
    trained = [arm for arm in arms if arm not in BASELINES]
    lines += ["", f"| captioner | decoder | less | {wide} |", "|---" * (3 + len(SCORES)) + "|"]
    for start in STARTS:
        for arm in [*trained, *(name for name in BASELINES[1:] if name in arms)]:
            for base in BASELINES if arm in trained else BASELINES[:1]:
                if base not in arms or base == arm:
                    continue
                cells = [difference(paired(found[start, arm], found[start, base], score)) for score in SCORES]
                lines.append(f"| {start} gen_for_und | {named(arm)} | {named(base)} | " + " | ".join(cells) + " |")
    lines += ["", f"| decoder, after less before gen_for_und | {wide} |", "|---" * (1 + len(SCORES)) + "|"]
    for arm in arms:
        before, after = (found[start, arm] for start in STARTS)
        cells = [difference(paired(after, before, score)) for score in SCORES]
        lines.append(f"| {named(arm)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_figure(path: pathlib.Path, found: Results, arms: Sequence[str]) -> None:
    """Both main scores of all arms: each seed a point, the mean with its interval beside them."""
    figure = matplotlib.figure.Figure(figsize=(9.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, score in zip(axes, MAIN):
        for place, (start, colour) in enumerate(zip(STARTS, ("tab:gray", "tab:blue"))):
            for index, arm in enumerate(arms):
                means = means_of(found[start, arm], score)
                if not means:
                    continue
                at, (mean, low, high) = index + 0.36 * place - 0.18, interval(means)
                axis.plot([at - 0.06] * len(means), means, "o", color=colour, alpha=0.4, markersize=4)
                spread = None if np.isnan(low) else [[mean - low], [high - mean]]
                label = f"captioner {start} gen_for_und" if index == 0 else None
                axis.errorbar([at + 0.06], [mean], yerr=spread, fmt="s", color=colour, capsize=3, label=label)
        axis.set_xticks(range(len(arms)), [named(arm).replace(", ", ",\n") for arm in arms], rotation=20, fontsize=8)
        axis.set_title(SCORES[score], fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[1].legend(fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
