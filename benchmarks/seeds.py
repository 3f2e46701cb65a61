"""What finished runs of several seeds show: the recipe's claims held against each, and all scores.

    python -m uae_jax.main --config=configs/unified_grpo.py --workdir=runs/seed_1 --config.seed=1    # and so on
    python -m benchmarks.seeds runs/seed_0 runs/seed_1 [--docs=dev/results.md]

A score is up when its 95 % interval after the stage lies above the one before it. The loss of cold_start is one minus
the reward of drawings of true captions, so that `true_caption_reward` is its reconstruction loss on held-out scenes.
The exit code is 1 when a claim does not hold in some run.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence

from benchmarks.documents import replace_block

SCORES = (
    "reward",
    "unified_score",
    "heldout_score",
    "caption_tokens",
    "fact_recall",
    "fact_precision",
    "scene_accuracy",
    "true_caption_reward",
    "true_caption_scene_accuracy",
    "geneval",
)
# more tokens are neither better nor worse
JUDGED = tuple(name for name in SCORES if name != "caption_tokens")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A score that a stage raises.

    Attributes:
      stage: the stage.
      score: of `SCORES`.
      before: it starts at this or less.
      after: it ends at this or more.
      times: the end is at least so many times the start.
      rise: and at least so much above it.
      outside: the interval of the end lies above that of the start.
    """

    stage: str
    score: str
    before: float = float("inf")
    after: float = -float("inf")
    times: float = 0.0
    rise: float = -float("inf")
    outside: bool = True

    def words(self) -> str:
        """Such as `from at most 0.6 to at least 0.9`."""
        said = [
            f"from at most {self.before:g}" if math.isfinite(self.before) else "",
            f"to at least {self.after:g}" if math.isfinite(self.after) else "",
            f"at least {self.times:g} times" if self.times else "",
            f"up by at least {self.rise:g}" if math.isfinite(self.rise) else "",
            "up, outside the intervals" if self.outside else "",
        ]
        return ", ".join(part for part in said if part)

    def holds(self, before: dict, after: dict) -> bool:
        """Of two `training.summary.interval`."""
        old, new = before["value"], after["value"]
        bounds = old <= self.before and new >= self.after and new >= self.times * old and new - old >= self.rise
        return bounds and (not self.outside or after["low"] > before["high"])


CLAIMS = (
    Claim("pretrain", "true_caption_scene_accuracy"),
    Claim("cold_start", "true_caption_reward"),
    Claim("gen_for_und", "fact_recall", before=0.6, after=0.9),
    Claim("gen_for_und", "fact_precision", after=0.95, outside=False),
    Claim("gen_for_und", "caption_tokens", times=1.5, outside=False),
    *(Claim("gen_for_und", score) for score in ("unified_score", "heldout_score", "scene_accuracy")),
    *(Claim("und_for_gen", score) for score in ("unified_score", "heldout_score", "scene_accuracy")),
    Claim("und_for_gen", "true_caption_scene_accuracy"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, by its `summary`."""

    summary: dict

    def stages(self) -> dict[str, dict]:
        """By name, the last of several rounds."""
        return {stage["name"]: stage for stage in self.summary["stages"]}


def read_run(workdir: pathlib.Path) -> Run:
    """A workdir of `uae_jax.main`.

    Raises:
      FileNotFoundError: it has no summary: the run is not finished, or is none.
    """
    path = workdir / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give workdirs of finished runs")
    return Run(json.loads(path.read_text()))


def shown(score: dict) -> str:
    """A value with its interval."""
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**score)


def claim_rows(runs: Sequence[Run]) -> list[tuple[str, str, str, list[tuple[str, bool]]]]:
    """(stage, score, claim, (text, holds) of each run); claims about stages or scores that a run has not are left
    out.
    """
    rows = []
    for claim in CLAIMS:
        pairs = [(run.stages().get(claim.stage, {"before": {}, "after": {}})) for run in runs]
        if all(claim.score in pair["before"] and claim.score in pair["after"] for pair in pairs):
            found = [(pair["before"][claim.score], pair["after"][claim.score]) for pair in pairs]
            rows.append(
                (
                    claim.stage,
                    claim.score,
                    claim.words(),
                    [(f"{shown(a)} to {shown(b)}", claim.holds(a, b)) for a, b in found],
                )
            )
    if all("cold_start" in run.stages() for run in runs):
        rows.insert(
            2,
            (
                "cold_start",
                "every other score",
                "not down outside its interval",
                [_worse(run.stages()["cold_start"]) for run in runs],
            ),
        )
    return rows


def _worse(stage: dict) -> tuple[str, bool]:
    before, after = stage["before"], stage["after"]
    worse = [name for name in JUDGED if name in before and name in after and after[name]["high"] < before[name]["low"]]
    return ", ".join(f"{name} {shown(before[name])} to {shown(after[name])}" for name in worse) or "none is", not worse


def page_block(runs: Sequence[Run]) -> tuple[str, bool]:
    """Markdown of the claims and of every run's scores, and whether all claims hold."""
    names = [f"seed {run.summary['seed']}" for run in runs]
    rows = claim_rows(runs)
    lines = ["### Claims", "", f"| stage | score | claim | {' | '.join(names)} |", "|---" * (3 + len(runs)) + "|"]
    for stage, score, words, cells in rows:
        lines.append(
            f"| {stage} | {score} | {words} | "
            + " | ".join(text if holds else f"**no:** {text}" for text, holds in cells)
            + " |"
        )
    for name, run in zip(names, runs):
        stages = run.summary["stages"]
        columns = [stages[0]["before"], *(stage["after"] for stage in stages)]
        count = columns[0]["reward"]["n"]
        lines += [
            "",
            f"### Scores, {name}",
            "",
            f"{run.summary['seconds'] / 60:.1f} minutes of stages and scores on {run.summary['device']}; {count} "
            "held-out scenes.",
            "",
            "| score | start | " + " | ".join(f"after {stage['name']}" for stage in stages) + " |",
            "|---" * (1 + len(columns)) + "|",
        ]
        lines += [
            f"| {score} | " + " | ".join(shown(column[score]) for column in columns) + " |"
            for score in SCORES
            if all(score in column for column in columns)
        ]
    return "\n".join(lines), all(holds for *_, cells in rows for _, holds in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+", help="of finished runs")
    parser.add_argument(
        "--docs", type=pathlib.Path, help="Markdown page for the tables, between two marks or at its end"
    )
    options = parser.parse_args(arguments)
    try:
        block, held = page_block([read_run(workdir) for workdir in options.workdirs])
        if options.docs:
            page = options.docs.read_text() if options.docs.exists() else ""
            options.docs.write_text(replace_block(page, "seeds", block))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(block)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
