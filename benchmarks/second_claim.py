"""The experiment of the second claim: does reinforcement by reconstruction make the decoder better?

    python -m benchmarks.second_claim --workdir=runs/second_claim               every arm of every seed, one by one
    python -m benchmarks.second_claim --workdir=runs/second_claim --seeds=101 --arms=none,flow_grpo
    python -m benchmarks.second_claim --workdir=runs/second_claim --tables_only --log=dev/second_claim.md \
        --docs=docs/results.md --figure=docs/images/second_claim.png

All arms start from the built-in model with a small decoder, which is made first (`configs/bootstrap.py:small_decoder`).
The captioner is that of the start model (`before`) or that of gen_for_und (`after`). The decoder is left alone
(`none`), or trained by Flow-GRPO with the plain reward, by the same with shuffled rewards, by flow matching on the same
captions, or jointly with the captioner. All settings are in second_claim.json, and nothing else decides a result. Every
arm is scored by `evaluate decoder`, on scenes and prompt texts that no run has trained on, at its best guidance of dev.

Ctrl-C and SIGTERM stop between two steps; the same command continues there. An arm that fails is told in one line, the
others go on, and the exit code is 1. The tables have differences to the baselines, paired by text, with 95 % intervals
over seeds (Student's t of the seeds' means).
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.ablations import ROOT, Stop, run_job
from benchmarks.claim_tables import SCORES, STARTS, Results, scores_table, tables, write_figure
from benchmarks.documents import replace_block
from uae_jax.files.json_files import write_json

SETTINGS = pathlib.Path(__file__).with_suffix(".json")
TRAIN, SCORE = ("-m", "uae_jax.main"), ("-m", "uae_jax.evaluate", "decoder")
MODEL = "model"
RECORD = "job.json"


def flat(changes: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of nested settings, such as `und_for_gen.flow_grpo.window`."""
    for name, value in changes.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def tuples(value: Any) -> Any:
    """Lists as tuples, as configurations have them."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: training or scoring.

    Attributes:
      name: of its folder.
      seed: of the run; None for what all seeds share.
      workdir: of all jobs.
      words: of its command line.
      what: settings that decide the result.
      command: the program.
    """

    name: str
    seed: int | None
    workdir: pathlib.Path
    words: tuple[str, ...]
    what: Mapping[str, Any]
    command: tuple[str, ...]

    @property
    def folder(self) -> pathlib.Path:
        """Of its record and log."""
        return self.workdir / ("" if self.seed is None else f"seed_{self.seed}") / self.name

    def arguments(self) -> list[str]:
        """Of the process."""
        return list(self.words)

    def settings(self) -> dict:
        """What decides the result, as JSON keeps it."""
        return json.loads(json.dumps(self.what))

    def record(self) -> dict:
        """`job.json`: `settings`, `finished` and `minutes`; empty before the first start."""
        path = self.folder / RECORD
        return json.loads(path.read_text()) if path.exists() else {}

    def write_record(self, finished: bool, minutes: float) -> None:
        """Replaces `job.json` as a whole."""
        write_json(
            self.folder / RECORD, {"settings": self.settings(), "finished": finished, "minutes": round(minutes, 3)}
        )


@dataclasses.dataclass(frozen=True)
class Programs:
    """What every experiment has.

    Attributes:
      settings: content of its file.
      workdir: of all jobs.
      train, score: the programs; tests have others.
    """

    settings: Mapping[str, Any]
    workdir: pathlib.Path
    train: tuple[str, ...]
    score: tuple[str, ...]


class Experiment(Programs):
    """The jobs of a settings file."""

    def model(self) -> Job:
        """The bootstrap of the start model, which all seeds share."""
        preset, folder = self.settings["bootstrap"], self.workdir / MODEL
        words = f"--config={ROOT / 'configs' / 'bootstrap'}.py:{preset}", f"--workdir={folder}"
        return Job(MODEL, None, self.workdir, words, {"preset": preset}, self.train)

    @property
    def start(self) -> pathlib.Path:
        """The start model."""
        return self.workdir / MODEL / "model"

    def run_of(
        self, name: str, seed: int, stage: str, start: pathlib.Path, changes: Mapping[str, Any], run: Mapping = {}
    ) -> Job:
        """Training of one stage, from the start model or the workdir of another job; `run`: fields of other parts."""
        shared = {**self.settings["shared"], **run, stage: changes, "seed": seed}
        folder = self.workdir / f"seed_{seed}" / name
        words = [f"--config={ROOT / 'configs' / stage}.py:{self.settings['preset']}", f"--workdir={folder}"]
        words += [f"--config.model.folder={start}"]
        words += [f"--config.{field}={tuples(value)}" for field, value in flat(shared)]
        what = {"preset": self.settings["preset"], "start": start.name, "changes": shared}
        return Job(name, seed, self.workdir, tuple(words), what, self.train)

    def start_of(self, start: str, seed: int) -> Job | None:
        """What the decoder's arms start from: the model after gen_for_und; None for the start model."""
        if start == "before":
            return None
        return self.run_of("captioner", seed, "gen_for_und", self.start, self.settings["captioner"])

    def trained(self, start: str, arm: str, seed: int) -> Job | None:
        """The training of an arm; None where nothing is trained."""
        changes = self.settings["arms"][arm]
        if changes is None:
            return self.start_of(start, seed)
        origin = self.start_of(start, seed)
        changes, run = {**self.settings["decoder"], **changes}, self.settings[start].get(arm, {})
        place = origin.folder if origin else self.start
        return self.run_of(f"{start}_{arm}", seed, "und_for_gen", place, changes, run)

    def scored(self, start: str, arm: str, seed: int) -> Job:
        """The scores of an arm, in `decoder.json` of its folder."""
        trained, name = self.trained(start, arm, seed), f"{start}_{arm}_scores"
        scoring = {**self.settings["scoring"], "scene_seed": self.settings["scene_seed"]}
        words = [f"--{field}={value}" for field, value in scoring.items()]
        words += [f"--output={self.workdir / f'seed_{seed}' / name / 'decoder.json'}"]
        words += [f"--checkpoint={trained.folder if trained else self.start}"]
        # an untrained model's noise is another one for each seed, like that of the others
        words += [f"--seed={seed}"]
        what = {"scoring": scoring, "of": (trained or self.model()).settings()}
        return Job(name, seed, self.workdir, tuple(words), what, self.score)

    def jobs(self, arms: Sequence[str], seed: int) -> list[Job]:
        """Of one seed in order, each once, after the start model."""
        found: dict[str, Job] = {MODEL: self.model()}
        for start in STARTS:
            for arm in arms:
                chain = self.start_of(start, seed), self.trained(start, arm, seed), self.scored(start, arm, seed)
                found |= {job.name: job for job in chain if job}
        return list(found.values())

    def values(self, start: str, arm: str, seed: int) -> dict[str, np.ndarray] | None:
        """Scores of every text of a finished arm; None before that."""
        job = self.scored(start, arm, seed)
        record = job.record()
        if not record.get("finished") or record["settings"] != job.settings():
            return None
        result = json.loads((job.folder / "decoder.json").read_text())
        return {name: np.array(result["values"][name]) for name in SCORES}


def results(experiment: Experiment, arms: Sequence[str], seeds: Sequence[int]) -> Results:
    """Of all finished arms."""
    return {
        (start, arm): {seed: values for seed in seeds if (values := experiment.values(start, arm, seed))}
        for start in STARTS
        for arm in arms
    }


def run_jobs(experiment: Any, arms: Sequence[str], seeds: Sequence[int], stop: Stop) -> int:
    """Runs what is not finished, one after the other; 0, 1 when some failed, 128 + signal when stopped."""
    failed: list[Job] = []
    for seed in seeds:
        for job in experiment.jobs(arms, seed):
            if stop.signum:
                print("stopped; the same command continues", file=sys.stderr)
                return 128 + stop.signum
            record, what = job.record(), job.name if job.seed is None else f"seed {seed} {job.name}"
            if record.get("finished") and record["settings"] == job.settings():
                print(f"{what}: done before in {record['minutes']:.1f} min", flush=True)
                continue
            needs = [other.name for other in failed if str(other.folder) in " ".join(job.words)]
            if needs:
                wrong = f"skipped, because it starts from {needs[0]}"
            else:
                wrong = run_job(job, job.command, stop)  # pyright: ignore[reportArgumentType] (has what it needs)
            if stop.signum:
                continue
            if wrong:
                failed.append(job)
            minutes = job.record().get("minutes", 0.0)
            print(f"{what}: " + (f"failed: {wrong}" if wrong else f"done in {minutes:.1f} min"), flush=True)
    if stop.signum:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + stop.signum
    return int(bool(failed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.second_claim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, required=True, help="folder of all runs; the same one continues"
    )
    parser.add_argument("--settings", type=pathlib.Path, default=SETTINGS, help="the frozen settings")
    parser.add_argument("--arms", default="", help="names with commas between; all when empty")
    parser.add_argument("--seeds", default="", help="numbers with commas between; those of the settings when empty")
    parser.add_argument(
        "--docs", type=pathlib.Path, help="Markdown page for the scores, between two marks or at its end"
    )
    parser.add_argument("--log", type=pathlib.Path, help="the same for all tables")
    parser.add_argument("--figure", type=pathlib.Path, help="image file for the figure of both main scores")
    parser.add_argument("--tables_only", action="store_true", help="print the tables of what is done, and end")
    parser.add_argument("--command", default="", help=argparse.SUPPRESS)  # in place of both programs, for tests
    options = parser.parse_args(arguments)
    try:
        settings = json.loads(options.settings.read_text())
        arms = [name for name in options.arms.split(",") if name] or list(settings["arms"])
        if unknown := [name for name in arms if name not in settings["arms"]]:
            raise ValueError(f"there is no arm {unknown[0]!r}; choose from {', '.join(settings['arms'])}")
        seeds = [int(seed) for seed in options.seeds.split(",") if seed] or settings["seeds"]
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    given = tuple(shlex.split(options.command))
    train, score = (given or (sys.executable, *program) for program in (TRAIN, SCORE))
    experiment, code = Experiment(settings, options.workdir.absolute(), train, score), 0
    if not options.tables_only:
        with Stop() as stop:
            code = run_jobs(experiment, arms, seeds, stop)
    found = results(experiment, arms, seeds)
    every = tables(found, arms)
    if options.figure:
        write_figure(options.figure, found, arms)
    for path, block in ((options.docs, scores_table(found, arms)), (options.log, every)):
        if path:
            page = path.read_text() if path.exists() else ""
            path.write_text(replace_block(page, "second_claim", block))
    print(every)
    return code


if __name__ == "__main__":
    sys.exit(main())
