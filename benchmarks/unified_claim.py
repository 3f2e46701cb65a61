"""The built-in unified model against its baselines: does reconstruction make one network better both ways?

    python -m benchmarks.unified_claim --workdir=runs/unified_claim               every arm of every seed, one by one
    python -m benchmarks.unified_claim --workdir=runs/unified_claim --seeds=201 --arms=unified_ar,shuffled
    python -m benchmarks.unified_claim --workdir=runs/unified_claim --tables_only --docs=docs/janus.md

All arms start from the built-in unified model. It is left alone (`none`), or trained by `unified_ar`, by the same with
shuffled rewards, or by supervision on true captions and images for as many seconds. Settings are in unified_claim.json.
Captions and reconstructions are scored by the run itself. Drawings of true captions are scored by `evaluate decoder`,
each arm at the guidance that is best for dev captions. Stopping and continuing are those of `benchmarks.second_claim`.
"""

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

from benchmarks.ablations import ROOT, Stop
from benchmarks.claim_tables import difference, over_seeds
from benchmarks.documents import replace_block
from benchmarks.second_claim import SCORE, TRAIN, Job, Programs, flat, run_jobs, tuples

SETTINGS = pathlib.Path(__file__).with_suffix(".json")
BLOCK, METHOD, BASELINES = "unified_claim", "unified_ar", ("none", "shuffled", "supervised")
NAMES = {
    "none": "no training",
    "unified_ar": "reconstruction",
    "shuffled": "shuffled rewards",
    "supervised": "supervised, for as many seconds",
}
# of the run's own scores, and of `evaluate decoder`
OWN = {
    "fact_recall": "facts that captions state",
    "fact_precision": "stated facts that are true",
    "unified_score": "similarity, both encoders",
    "heldout_score": "similarity, held-out encoder",
}
DRAWN = {"true_caption_scene_accuracy": "facts of true captions drawn"}
HEADS = {**OWN, **DRAWN}
# arm to seed to score to its mean
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]


class Experiment(Programs):
    """The jobs of a settings file; `second_claim.run_jobs` runs them."""

    def trained(self, arm: str, seed: int) -> Job | None:
        """The training of an arm; None where nothing is trained."""
        changes = self.settings["arms"][arm]
        if changes is None:
            return None
        folder, others = self.workdir / f"seed_{seed}" / arm, self.settings["others"].get(arm, {})
        words = [f"--config={ROOT / 'configs' / METHOD}.py", f"--workdir={folder}", f"--config.seed={seed}"]
        words += [f"--config.{field}={tuples(value)}" for field, value in flat({METHOD: changes, **others})]
        what = {"changes": changes, "seed": seed} | ({"others": others} if others else {})
        return Job(arm, seed, self.workdir, tuple(words), what, self.train)

    def scored(self, arm: str, seed: int) -> Job:
        """The scores of an arm's drawings, in `decoder.json` of its folder."""
        trained, name = self.trained(arm, seed), f"{arm}_scores"
        scoring = {**self.settings["scoring"], "seed": seed}
        words = [f"--{field}={value}" for field, value in scoring.items()]
        words += [f"--output={self.workdir / f'seed_{seed}' / name / 'decoder.json'}"]
        words += [f"--checkpoint={trained.folder if trained else 'unified'}"]
        what = {"scoring": scoring, "of": trained.settings() if trained else "unified"}
        return Job(name, seed, self.workdir, tuple(words), what, self.score)

    def jobs(self, arms: Sequence[str], seed: int) -> list[Job]:
        """Of one seed in order."""
        return [job for arm in arms for job in (self.trained(arm, seed), self.scored(arm, seed)) if job]

    def values(self, arm: str, seed: int) -> dict[str, float] | None:
        """The mean scores of a finished arm, None before that; those of `none` are another arm's before training."""
        scored, trained = self.scored(arm, seed), self.trained(arm if arm != "none" else METHOD, seed)
        if trained is None or not all(job.record().get("finished") for job in (scored, trained)):
            return None
        (stage,) = json.loads((trained.folder / "summary.json").read_text())["stages"]
        own = stage["before" if arm == "none" else "after"]
        scales = list(json.loads((scored.folder / "decoder.json").read_text())["scales"].values())
        best = {name: max(scales, key=lambda rows, name=name: rows["dev"][name])["test"][name] for name in DRAWN}
        return {name: own[name]["value"] for name in OWN} | {name: score["value"] for name, score in best.items()}


def results(experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]) -> Scores:
    """Of all finished arms."""
    return {
        arm: {seed: values for seed in seeds if (values := experiment.values(arm, seed)) is not None} for arm in arms
    }


def tables(found: Scores) -> str:
    """Markdown: the scores of every arm, then how far the method is above each baseline, by seed."""
    wide = " | ".join(HEADS.values())
    lines = [f"| arm | seeds | {wide} |", "|---" * (2 + len(HEADS)) + "|"]
    for arm, runs in found.items():
        cells = [over_seeds([values[name] for values in runs.values()]) for name in HEADS]
        lines.append(f"| {NAMES[arm]} | {len(runs)} | " + " | ".join(cells) + " |")
    lines += ["", f"| reconstruction less | {wide} |", "|---" * (1 + len(HEADS)) + "|"]
    method = found.get(METHOD, {})
    for base in BASELINES:
        runs = found.get(base, {})
        both = [seed for seed in method if seed in runs]
        cells = [difference([method[seed][name] - runs[seed][name] for seed in both]) for name in HEADS]
        lines.append(f"| {NAMES[base]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unified_claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of all runs")
    parser.add_argument("--settings", type=pathlib.Path, default=SETTINGS, help="the settings of the arms")
    parser.add_argument("--arms", default="", help="names with commas between; all when empty")
    parser.add_argument("--seeds", default="", help="numbers with commas between; those of the settings when empty")
    parser.add_argument("--docs", type=pathlib.Path, help="Markdown page for the tables, between two marks")
    parser.add_argument("--tables_only", action="store_true", help="print the tables of what is done, and end")
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)  # in place of both programs, for tests
    options = parser.parse_args(arguments)
    settings = json.loads(options.settings.read_text())
    arms = [name for name in options.arms.split(",") if name] or list(settings["arms"])
    if unknown := [name for name in arms if name not in settings["arms"]]:
        parser.error(f"there is no arm {unknown[0]!r}; choose from {', '.join(settings['arms'])}")
    seeds = [int(seed) for seed in options.seeds.split(",") if seed] or settings["seeds"]
    given = tuple(shlex.split(options.command))
    train, score = (given or (sys.executable, *program) for program in (TRAIN, SCORE))
    experiment, code = Experiment(settings, options.workdir.absolute(), train, score), 0
    if not options.tables_only:
        with Stop() as stop:
            code = run_jobs(experiment, arms, seeds, stop)
    block = tables(results(experiment, arms, seeds))
    if options.docs:
        page = options.docs.read_text() if options.docs.exists() else ""
        options.docs.write_text(replace_block(page, BLOCK, block))
    print(block)
    return code


if __name__ == "__main__":
    sys.exit(main())
