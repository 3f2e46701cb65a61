"""A complete run: reads model and data once, runs the stages in order, leaves summary, report, samples and export.

Every stage starts from what the stages before it left. The same workdir continues where it stopped: finished stages are
read back, and the stage that was interrupted continues from its newest checkpoint.
"""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
from uae_jax.data.loader import Batches, make_loader
from uae_jax.data.sources import SceneSource, Source
from uae_jax.files.json_files import write_json
from uae_jax.files.paths import copy_folder
from uae_jax.methods.method import build_step, make_method, start_of
from uae_jax.methods.trained import store, trainable, with_policy_as_transformer
from uae_jax.nn.cpu.compiler import compiler_options
from uae_jax.rollouts.frozen_inputs import NEGATIVE, negative_states
from uae_jax.settings import as_dict
from uae_jax.stages.banner import FILES, banner, stage_lines
from uae_jax.stages.checks import checked_config, missing_captions, stage_identity
from uae_jax.stages.data import check_same_images, few_images, open_data, unknown_captions
from uae_jax.stages.folders.parts import weights_digest
from uae_jax.stages.kinds import kind_of, load_system
from uae_jax.stages.model_card import run_card, write_card
from uae_jax.stages.precomputed import check_images, compare, open_inputs, parts_read
from uae_jax.stages.program import with_adapters
from uae_jax.stages.run_config import RunConfig, is_rl
from uae_jax.stages.understanding import open_understanding
from uae_jax.stages.weights import model_folder
from uae_jax.stages.workload import expected_work
from uae_jax.training import processes
from uae_jax.training.guard import skip_outliers
from uae_jax.training.lock import workdir_lock
from uae_jax.training.loop import run_stage
from uae_jax.training.loop_config import Hooks, LoopConfig
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.progress import EXPORT, SCORES, SCORES_DURING, Progress
from uae_jax.training.records import StageResult, drop_checkpoints, finished_record, keep_trained, read_trained
from uae_jax.training.report import write_report
from uae_jax.training.step import TrainState
from uae_jax.training.summary import begun, intervals, write_summary
from uae_jax.training.watch import Watch

CACHE = "jax_compilation_cache_dir"  # the setting of jax
OfStage = Callable[[RunConfig, str], float | None]  # a figure of a stage


def run(
    config: Mapping[str, Any] | RunConfig, workdir: pathlib.Path, seconds_at_peak: OfStage = lambda *_: None
) -> dict[str, Any]:
    """Runs all stages of a configuration and returns the contents of `summary.json`.

    Args:
      config: of a file in `configs/`, or settings that `checks.checked_config` made of it.
      workdir: made if absent; continued if it holds the same configuration.
      seconds_at_peak: of a step of a stage, for the metric `perf/mfu` (`planning.utilisation`); None where unknown.

    Raises:
      ValueError, FileNotFoundError: something in config, model, data or workdir does not fit, one line each; nothing
        was overwritten.
      StopTraining: asked to stop; the same call continues.
    """
    settings = config if isinstance(config, RunConfig) else checked_config(config, workdir)
    progress = Progress(expected_work(settings, workdir))
    whole = Run(settings, workdir, seconds_at_peak, progress)
    workdir.mkdir(exist_ok=True)
    keep_programs(workdir / "compiled")
    processes.check_shared(workdir)
    results: list[StageResult] = []
    summary = None
    with workdir_lock(workdir), sharding.in_use(whole.mesh):
        begun(workdir)
        check_same_images(workdir, whole.data)
        finished = {
            name for name, stage in settings.order() if finished_record(workdir, name, settings.stage(stage).steps)
        }
        if jax.process_index() == 0:
            write_json(workdir / "config.json", as_dict(settings))
        writer = MetricWriter(workdir, wandb_project=settings.loop.wandb_project, config=as_dict(settings))
        for name, stage in settings.order():
            result = whole.train_stage(name, stage, writer, results[-1] if results else None)
            # the next stage goes on from `whole.parts`; the optimizer's moments of this one would stay on the devices
            results.append(dataclasses.replace(result, state=None))
            del result
            if len(results) > 1:
                drop_checkpoints(workdir, results[-2].name)
            if name not in finished:  # else the outputs may be those of a later stage
                summary = _write_outputs(whole, results)
        if not results:
            with whole.scoring("scores", SCORES):
                scores = whole.scores(whole.parts, workdir / "samples" / "evaluate_after")
            results.append(StageResult("evaluate", None, 0, 0.0, 0.0, {}, scores))
        summary = summary or _write_outputs(whole, results)
        writer.close()
    return summary


class Run:
    """What all stages of one run share, and the model's parts as the stages leave them.

    Args:
      config: the frozen configuration, checked.
      workdir: where everything is written; its parent exists.
      seconds_at_peak: see `run`.
      progress: shows what is under way.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        seconds_at_peak: OfStage = lambda *_: None,
        progress: Progress | None = None,
    ):
        self.progress = progress or Progress()
        self.config, self.workdir, self.seconds_at_peak = config, workdir, seconds_at_peak
        self.mesh = sharding.make_mesh(config.mesh)
        self.key = jax.random.key(config.seed)
        if jax.process_index() == 0:
            tell(banner(config, workdir), ())
        self.kind = kind_of(config.model.folder)
        self.weights = weights_digest(model_folder(config.model.folder))
        self.data = open_data(config.data, config.seed, config.evaluation.images)
        self.source = self.data.train
        if found := list(missing_captions(config, self.data)):
            raise ValueError(found[0])
        check_images(config, self.data)
        if jax.process_index() == 0:
            tell(self.data.lines, few_images(config, self.source))
        with self.progress.phase("reading the model"):
            system = load_system(
                config.model,
                image_size=config.data.image_size,
                negative_prompt=config.data.negative_prompt,
                mesh=self.mesh,
                max_caption=config.stage("gen_for_und").max_new_tokens,
                frozen=config.frozen_from_start(),
                control_tokens=config.data.control_tokens,
            )
        # the stages replace and donate parameters: no second name may keep the first ones alive
        self.system = dataclasses.replace(system, parts={})
        self.rows = self.kind.rows(config.data, self.system)
        if jax.process_index() == 0:
            tell((), unknown_captions(config, self.data, self.rows))
        self.precomputed = open_inputs(config, self.system.model, self.data)
        parts = with_adapters(config, system.model, system.parts, self.key)
        sharding.check_rules(parts, self.mesh)
        self.parts = sharding.shard_tree(parts, self.mesh)
        del parts
        if jax.process_index() == 0:
            tell(["", *stage_lines(config, self.system.model, self.parts, self.key), "", *FILES], ())
        if self.precomputed:
            if jax.process_index() == 0:
                tell([self.precomputed.line], ())
            compare(self.precomputed, self.system.model, self.parts, self.source, self.rows, self.mesh)
        self.evaluator = self.kind.evaluator(config, self.system, self.data.heldout, self.rows, self.mesh)
        scores = config.evaluation
        self.understanding = open_understanding(scores, config.data, self.source, self.system, self.mesh)

    def train_stage(self, name: str, stage: str, writer: MetricWriter, previous: StageResult | None) -> StageResult:
        """Runs one stage to its end and takes over what it trained.

        Args:
          name: of its files; stage: its kind.
          writer: of metrics.
          previous: the stage before; its scores after are this one's before.
        """
        config, rl = self.config.stage(stage), is_rl(stage, self.config)
        key = trees.name_key(self.key, name)
        record = finished_record(self.workdir, name, config.steps)
        if record and self.read_back(name, stage, key):
            return StageResult(state=None, **record)
        method = make_method(stage, config, self.config.sampler, self.system)
        guard = dataclasses.replace(self.config.guard, kl=getattr(self.config.guard, method.kl_bound))
        optimizer = skip_outliers(make_optimizer(config.optimizer, config.total_updates), guard)
        state = self.start_state(stage, optimizer, key)
        identity = stage_identity(self.config, name, self.weights)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(self.mesh, PartitionSpec())
        with contextlib.closing(self.batches(stage, config.batch_size)) as data:
            result = run_stage(
                name,
                build_step(method, optimizer, shardings, compiler_options(self.config.model.dtype)),
                state=state,
                frozen=self.frozen_of(stage),
                data=data,
                key=sharding.replicate_key(key, self.mesh),
                workdir=self.workdir,
                config=self.loop_config(config.steps, rl),
                writer=writer,
                put=lambda batch: sharding.shard_batch(batch, self.mesh),
                hooks=Hooks(
                    before=lambda state: self.score_before(state, name, previous, writer),
                    after=lambda state: self.score(state, name, "after", writer),
                    evaluate=lambda state, step: self.score_during(state, name, step, writer),
                    answers=lambda state, step: self.answers(state),
                ),
                guard=guard,
                identity=identity,
                free=self.config.free(name),
                scoring=self.config.evaluation.scoring(),
                watch=Watch(
                    self.workdir,
                    name,
                    profile=self.config.loop.profile,
                    hang_minutes=self.config.loop.hang_minutes,
                    seconds_at_peak=self.seconds_at_peak(self.config, stage),
                ),
                progress=self.progress,
            )
        if self.config.order()[-1][0] != name:  # nothing reads back what the last stage has trained
            keep_trained(self.workdir, result, trained_by(result.state), identity)
        self.parts = self.trained(result.state)
        return result

    def read_back(self, name: str, stage: str, key: jax.Array) -> bool:
        """Takes over what a finished stage has trained, without its optimizer; False where that is not on disk."""
        if not is_rl(stage, self.config):
            self.parts = with_policy_as_transformer(self.parts)
        rank = getattr(self.config.stage(stage), "lora_rank", 1)
        model, names = self.system.model, self.config.trains(stage)
        shapes = jax.eval_shape(lambda parts: trainable(model, parts, names, rank, key), self.parts)
        places = sharding.tree_shardings(shapes, self.mesh)
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
        )
        found = read_trained(self.workdir, name, target)
        if found is not None:
            self.parts = {**self.parts, **found}
        return found is not None

    def start_state(self, stage: str, optimizer: Any, key: jax.Array) -> TrainState:
        """The state of a stage at step 0. What it trains leaves `self.parts`, and the rest is stored as it asks.

        A second copy of 8 B weights would not fit: from here on the trained parts live in the state alone.
        """
        config = self.config.stage(stage)
        if not is_rl(stage, self.config):
            self.parts = with_policy_as_transformer(self.parts)
        rank = getattr(config, "lora_rank", 1)
        start = trainable(self.system.model, self.parts, self.config.trains(stage), rank, key)
        state = sharding.make_on(self.mesh, lambda parts: start_of(parts, optimizer, config), start)
        parts, self.parts = {name: part for name, part in self.parts.items() if name not in start}, {}
        del start
        store(parts, self.config.trained_from(stage), self.config.model.frozen_dtype)
        self.parts = parts
        return state

    def loop_config(self, steps: int, rl: bool) -> LoopConfig:
        """Durations of a stage; supervised stages are not scored while they run."""
        loop = self.config.loop
        return LoopConfig(
            steps=steps,
            log_every=loop.log_every,
            save_every=loop.save_every,
            keep=loop.keep,
            save_every_minutes=loop.save_every_minutes,
            eval_every=loop.eval_every if rl else 0,
        )

    def frozen_of(self, stage: str) -> dict:
        """What a step of a stage reads and does not change, when `start_state` has taken what it trains."""
        if "states" not in parts_read(self.config, stage):
            return self.parts
        length, model = self.config.data.max_caption, self.system.model
        make = jax.jit(
            lambda parts: negative_states(model, parts, length), out_shardings=sharding.replicated(self.mesh)
        )
        with sharding.in_use(self.mesh):
            return {**self.parts, NEGATIVE: make({"language": self.parts["language"]})}

    def batches(self, stage: str, batch_size: int) -> Batches:
        """The loader of a stage's batches, from their beginning, with the fields that the stage reads."""
        index, count = sharding.batch_slice(self.mesh)
        precomputed = parts_read(self.config, stage)
        reads = self.config.reads(stage, precomputed)
        source, rows = self.source_of(stage), self.rows.only(reads)
        if self.precomputed and precomputed:
            source, rows = self.precomputed.loaded(source, self.rows, reads)
        return make_loader(
            source,
            rows,
            batch_size,
            self.config.seed,
            process_index=index,
            process_count=count,
            reading=self.config.data.reading,
        )

    def source_of(self, stage: str) -> Source:
        """The training images with the captions that a stage sees."""
        if is_rl(stage, self.config) and isinstance(self.source, SceneSource):
            return dataclasses.replace(self.source, captions=self.config.data.rl_detail, mistakes=0.0)
        return self.source

    def score_before(self, state: TrainState, name: str, previous: StageResult | None, writer: MetricWriter) -> dict:
        """Scores before a stage: those after the previous one with its samples, if their settings are still the same,
        or new ones.
        """
        scoring = self.config.evaluation.scoring()
        if previous is None or previous.scoring.get("after", scoring) != scoring:
            return self.score(state, name, "before", writer)
        samples = self.workdir / "samples"
        if jax.process_index() == 0:
            copy_folder(samples / f"{previous.name}_after", samples / f"{name}_before")
        writer.samples(name, 0, samples / f"{name}_before")
        return dict(previous.after)

    def trained(self, state: TrainState) -> dict:
        """All parts with those of a stage in place, its moving average where it keeps one."""
        return {**self.parts, **trained_by(state)}

    def score(self, state: TrainState, name: str, when: str, writer: MetricWriter) -> dict:
        """Scores of a stage's state; samples go to `samples/<name>_<when>`."""
        folder = self.workdir / "samples" / f"{name}_{when}"
        with self.scoring(f"{name}: scores {when} the steps", SCORES):
            found = self.scores(with_policy_as_transformer(self.trained(state)), folder)
        writer.samples(name, 0 if when == "before" else int(state.step), folder)
        return found

    @contextlib.contextmanager
    def scoring(self, words: str, kind: str) -> Iterator[None]:
        """The block of a pass of scores, with a bar over its rows."""
        with self.progress.phase(words, kind=kind, total=self.evaluator.rows_of(kind == SCORES)) as phase:
            self.evaluator.advance = phase.advance
            yield

    def scores(self, parts: Mapping, folder: pathlib.Path) -> dict:
        """Held-out scores of parameters and their answers to questions, with intervals; samples go to the folder."""
        answers = self.understanding(parts) if self.understanding else {}
        return self.evaluator(parts, folder) | intervals(answers)

    def answers(self, state: TrainState) -> dict[str, float]:
        """Accuracy on the run's questions in the middle of a stage; {} without questions."""
        answers = self.understanding(self.trained(state)) if self.understanding else {}
        return {name: float(np.mean(values)) for name, values in answers.items()}

    def score_during(self, state: TrainState, name: str, step: int, writer: MetricWriter) -> dict[str, float]:
        """Held-out scores in the middle of a stage; samples go to `samples/<name>_step<step>`."""
        folder = self.workdir / "samples" / f"{name}_step{step}"
        with self.scoring(f"{name}: scores after step {step}", SCORES_DURING):
            found = self.evaluator.during(with_policy_as_transformer(self.trained(state)), folder)
        writer.samples(name, step, folder)
        return found


def trained_by(state: TrainState) -> dict:
    """What a stage has trained: its moving average where it keeps one."""
    return state.params if state.ema is None else state.ema


def keep_programs(folder: pathlib.Path) -> None:
    """Keeps compiled programs in a folder, so that a restart compiles none again; not on CPUs.

    A program for one CPU may stop another one, and nothing tells them apart. A cache that is set already stays.
    """
    if jax.default_backend() == "cpu" or getattr(jax.config, CACHE):
        return
    jax.config.update(CACHE, str(folder))
    compilation_cache.reset_cache()  # what was compiled before may have found that there is none


def tell(lines: Iterable[str], notes: Iterable[str]) -> None:
    """Prints what was found of the data, and on stderr what to mind of it; letters that cannot be printed as codes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def printable(line: str) -> str:
        shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
        return shown.encode(encoding, "backslashreplace").decode(encoding)

    for line in lines:
        print(printable(line), flush=True)
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def _write_outputs(whole: Run, results: list[StageResult]) -> dict[str, Any]:
    if whole.config.stages:
        with whole.progress.phase("export", kind=EXPORT):
            whole.kind.export(whole.system, whole.parts, whole.workdir / "export", whole.config.loop.export_dtype)
    summary = write_summary(
        whole.workdir,
        preset=whole.config.preset,
        seed=whole.config.seed,
        stages=[result.record() for result in results],
        data=whole.data.records(),
        elapsed=time.time() - begun(whole.workdir),
    )
    if jax.process_index() == 0:
        if whole.config.stages:
            write_card(whole.workdir / "export", run_card(whole.config, summary))
        write_report(whole.workdir)
    processes.wait_for_all("outputs written")
    return summary
