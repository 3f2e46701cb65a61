"""A whole run: reads the model and the data once, runs the stages in order, and leaves summary, report, samples and
export.

Every stage starts from what the stages before it left. The same workdir continues where it stopped: finished stages are
read back, the stage that was interrupted goes on from its newest checkpoint.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
from uae_jax.data.emoji import EmojiSet, EmojiSource
from uae_jax.data.loader import RowBuilder, batch_shapes, batch_spec, make_loader
from uae_jax.data.sources import Example, FolderSource, SceneSource, Source, TfdsSource
from uae_jax.files.json_files import write_json
from uae_jax.rl.caption_policy import CaptionPolicy
from uae_jax.rl.flow_policy import FlowPolicy
from uae_jax.rl.nft_policy import NftPolicy
from uae_jax.stages import gen_for_und
from uae_jax.stages.evaluation import Evaluator
from uae_jax.stages.export import export_system
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import DataConfig, RunConfig
from uae_jax.stages.settings import frozen
from uae_jax.stages.steps import (
    RL_STAGES,
    STAGES,
    check_batch,
    held,
    make_denoising,
    make_policy,
    make_step,
    with_drawing_policy,
)
from uae_jax.stages.weights import load_system
from uae_jax.training import processes
from uae_jax.training.guard import skip_outliers
from uae_jax.training.loop import Hooks, LoopConfig, StageResult, check_configuration, run_stage
from uae_jax.training.metrics import MetricWriter
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.report import write_report
from uae_jax.training.step import TrainState, init_state
from uae_jax.training.summary import write_summary


def open_sources(config: DataConfig, seed: int, heldout: int) -> tuple[Source, list[Example]]:
    """The training source, and `heldout` pictures that it does not contain.

    Raises:
      ValueError, FileNotFoundError: an unknown source, or one that cannot be read; see `data.sources`.
    """
    if config.source in ("scenes", "emoji"):
        source = (
            SceneSource if config.source == "scenes" else functools.partial(EmojiSource, emoji=EmojiSet(config.folder))
        )
        train = source("train", seed, config.image_size, config.detail, mistakes=config.mistakes)
        test = source("test", 0, config.image_size, "full")
        return train, [test[index] for index in range(heldout)]
    if config.source == "folder":
        if not config.folder:
            raise ValueError(
                "config.data.folder is empty; give a folder with images and captions.jsonl, or data.source='scenes'"
            )
        train = FolderSource(config.folder)
        if config.heldout_folder:
            test = FolderSource(config.heldout_folder)
            return train, [test[index] for index in range(min(heldout, len(test)))]
        kept = min(heldout, max(1, len(train) // 10))
        examples = [train[index] for index in range(len(train) - kept, len(train))]
        train.rows = train.rows[: len(train.rows) - kept]
        return train, examples
    if config.source == "tfds":
        keys = dict(image_key=config.image_key, caption_key=config.caption_key)
        train = TfdsSource(config.name, config.split, config.data_dir or None, **keys)
        test = TfdsSource(config.name, config.heldout_split, config.data_dir or None, **keys)
        return train, [test[index] for index in range(min(heldout, len(test)))]
    raise ValueError(f"config.data.source is {config.source!r}; choose scenes, emoji, folder or tfds")


def with_adapters(config: RunConfig, parts: Mapping, key: jax.Array) -> dict:
    """The parts, and adapters that are zero for the stages that will train one: all stages then share their compiled
    programs.

    A stage that trains a whole copy makes it when it begins, of what the stages before it have trained.

    Args:
      config: of the run.
      parts: of the loaded model.
      key: of the run.

    Raises:
      ValueError: see `gen_for_und.check_start`.
    """
    whole = dict(parts)
    for stage in (stage for _, stage in config.order() if stage in RL_STAGES):
        gen_for_und.check_start(parts, stage, getattr(config, stage).train)
        if getattr(config, stage).train == "lora":
            whole |= STAGES[stage][1](whole, getattr(config, stage), key)
    return whole


class Run:
    """What all stages of one run share, and the model's parts as the stages leave them.

    Args:
      config: the frozen configuration.
      workdir: where everything is written; its parent exists.
    """

    def __init__(self, config: RunConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.mesh = sharding.make_mesh(config.mesh)
        self.key = jax.random.key(config.seed)
        system = load_system(
            config.model,
            image_size=config.data.image_size,
            negative_prompt=config.data.negative_prompt,
            mesh=self.mesh,
            max_caption=config.gen_for_und.max_new_tokens,
            frozen=config.frozen_from_start(),
        )
        # the stages replace and donate parameters: no second name may keep the first ones alive
        self.system = dataclasses.replace(system, parts={})
        self._check_encoders()
        self._check_stages()
        self.source, heldout = open_sources(config.data, config.seed, config.evaluation.images)
        spec = batch_spec(
            self.system.tokenizer,
            self.system.processor,
            config.data.image_size,
            config.data.caption_prompt,
            config.data.max_caption,
        )
        if config.data.max_prompt:
            spec = dataclasses.replace(spec, max_prompt=config.data.max_prompt)
        self.rows = RowBuilder(self.system.tokenizer, self.system.processor, spec, config.data.caption_prompt)
        parts = with_adapters(config, system.parts, self.key)
        sharding.check_rules(parts, self.mesh)
        self.parts = sharding.shard_tree(parts, self.mesh)
        del parts
        self.evaluator = Evaluator(
            self.system,
            config.evaluation,
            make_denoising(
                config.sampler,
                config.evaluation.sampler_steps,
                config.evaluation.guidance_scale,
                policy_condition=config.policy_condition(),
            ),
            heldout,
            self.rows,
            config.data.max_caption,
            config.seed,
        )

    def _check_encoders(self) -> None:
        wanted = {name for stage in ("cold_start", *RL_STAGES) for name in getattr(self.config, stage).reward.names}
        wanted |= set(self.config.evaluation.encoders)
        missing = sorted(wanted - set(self.system.encoders))
        if missing:
            raise FileNotFoundError(
                f"the reward needs the image encoder {missing[0]!r}; put it at {self.system.folder / missing[0]}"
            )

    def _check_stages(self) -> None:
        """Builds every stage's description, which checks most settings in an instant."""
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        for _, stage in self.config.order():
            check_batch(stage, getattr(self.config, stage), ways)
            if stage in RL_STAGES:
                self.policy(stage)

    def check_programs(self) -> None:
        """Traces the step of every stage without computing, so that a setting of the last one does not fail after the
        first ones ran.

        Raises:
          ValueError: a setting with which a step cannot be built.
        """
        shapes = jax.eval_shape(dict, self.parts)

        def batch(size: int) -> dict:
            fields = batch_shapes(self.rows.spec, size, self.rows.processor)
            return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in fields.items()}

        with sharding.in_use(self.mesh):
            for stage in dict.fromkeys(stage for _, stage in self.config.order()):
                try:
                    program = make_program(self.config, self.system, shapes, batch, stage)
                    jax.eval_shape(program.step, *program.arguments)
                except ValueError as error:
                    raise ValueError(f"{stage}: {error}") from error

    def step(self, stage: str, state: TrainState, optimizer: Any) -> Callable:
        """The compiled train step of a stage."""
        shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(self.mesh, PartitionSpec()))
        return make_step(stage, getattr(self.config, stage), self.config.sampler, self.system, optimizer, shardings)

    def policy(self, stage: str) -> CaptionPolicy | FlowPolicy | NftPolicy:
        """The description of an RL stage."""
        return make_policy(stage, getattr(self.config, stage), self.config.sampler, self.system)

    def run_stage(self, name: str, stage: str, writer: MetricWriter, previous: StageResult | None) -> StageResult:
        """Runs one stage to its end and takes over what it trained.

        Args:
          name: of its files; stage: its kind.
          writer: of metrics.
          previous: the stage before; its scores after are this one's before.
        """
        config = getattr(self.config, stage)
        total = config.steps * config.updates_per_rollout
        guard = self.config.guard
        if stage == "und_for_gen":
            guard = dataclasses.replace(guard, kl=guard.flow_kl)
        optimizer = skip_outliers(make_optimizer(config.optimizer, total), guard)
        if stage not in RL_STAGES:
            self.parts = with_drawing_policy(self.parts)
        start = STAGES[stage][1](self.parts, config, trees.name_key(self.key, name))
        state = sharding.make_on(
            self.mesh, lambda parts: init_state(parts, optimizer, ema=bool(config.ema_decay)), start
        )
        # from here on the trained parts live in the state alone: a second copy of 8 B weights would not fit
        parts, self.parts = {key: value for key, value in self.parts.items() if key not in start}, {}
        del start
        for key in list(parts):  # one by one: a part is gone before the next is copied
            parts |= held({key: parts.pop(key)}, self.config.trained_from(stage), self.config.model.frozen_dtype)
        self.parts = parts
        index, count = sharding.batch_slice(self.mesh)
        data = make_loader(
            self.source_of(stage),
            self.rows,
            config.batch_size,
            self.config.seed,
            process_index=index,
            process_count=count,
        )
        settings = self.config.loop
        loop = LoopConfig(
            steps=config.steps,
            log_every=settings.log_every,
            save_every=settings.save_every,
            keep=settings.keep,
            eval_every=settings.eval_every if stage in RL_STAGES else 0,
        )
        result = run_stage(
            name,
            self.step(stage, state, optimizer),
            state=state,
            frozen=self.parts,
            data=data,
            key=sharding.replicate_key(trees.name_key(self.key, name), self.mesh),
            workdir=self.workdir,
            config=loop,
            writer=writer,
            put=lambda batch: sharding.shard_batch(batch, self.mesh),
            hooks=Hooks(
                before=lambda state: self.score_before(state, name, previous),
                after=lambda state: self.score(state, name, "after"),
                evaluate=lambda state, step: self.score_during(state, name, step),
            ),
            guard=guard,
            digest=self.config.digest(name),
        )
        self.parts = self.trained(result.state)
        return result

    def source_of(self, stage: str) -> Source:
        """The training pictures with the captions that a stage sees."""
        if stage in RL_STAGES and isinstance(self.source, SceneSource):
            return dataclasses.replace(self.source, captions=self.config.data.rl_detail, mistakes=0.0)
        return self.source

    def score_before(self, state: TrainState, name: str, previous: StageResult | None) -> dict:
        """Scores before a stage: those after the previous one, with its samples, or new ones for the first."""
        if previous is None:
            return self.score(state, name, "before")
        samples = self.workdir / "samples"
        if jax.process_index() == 0:
            shutil.copytree(samples / f"{previous.name}_after", samples / f"{name}_before", dirs_exist_ok=True)
        return dict(previous.after)

    def trained(self, state: TrainState) -> dict:
        """All parts with those of a stage in place, its moving average where it keeps one."""
        return {**self.parts, **(state.params if state.ema is None else state.ema)}

    def score(self, state: TrainState, name: str, when: str) -> dict:
        """Held-out scores of a stage's state; samples go to `samples/<name>_<when>`."""
        return self.evaluator(with_drawing_policy(self.trained(state)), self.workdir / "samples" / f"{name}_{when}")

    def score_during(self, state: TrainState, name: str, step: int) -> dict[str, float]:
        """Held-out scores in the middle of a stage; samples go to `samples/<name>_step<step>`."""
        return self.evaluator.during(
            with_drawing_policy(self.trained(state)), self.workdir / "samples" / f"{name}_step{step}"
        )


def run(config: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all stages of a configuration and returns the contents of `summary.json`.

    Args:
      config: of a file in `configs/`.
      workdir: made if absent; continued if it holds the same configuration.

    Raises:
      ValueError, FileNotFoundError: something in config, model, data or workdir does not fit; nothing was overwritten.
      StopTraining: asked to stop; the same call continues.
    """
    settings = frozen(RunConfig, config)
    _check_workdir(settings, workdir)
    whole = Run(settings, workdir)
    whole.check_programs()
    workdir.mkdir(exist_ok=True)
    processes.check_shared(workdir)
    finished = {name for name, _ in settings.order() if (workdir / "checkpoints" / name / "finished.json").exists()}
    if jax.process_index() == 0:
        write_json(workdir / "config.json", dataclasses.asdict(settings))
    writer = MetricWriter(workdir, wandb_project=settings.loop.wandb_project, config=dataclasses.asdict(settings))
    results: list[StageResult] = []
    summary = None
    with sharding.in_use(whole.mesh):
        for name, stage in settings.order():
            results.append(whole.run_stage(name, stage, writer, results[-1] if results else None))
            if name not in finished:  # else the outputs may be those of a later stage
                summary = _write_outputs(whole, results)
        if not results:
            scores = whole.evaluator(whole.parts, workdir / "samples" / "evaluate_after")
            results.append(StageResult("evaluate", None, 0, 0.0, 0.0, {}, scores))
    summary = summary or _write_outputs(whole, results)
    writer.close()
    return summary


def _check_workdir(config: RunConfig, workdir: pathlib.Path) -> None:
    """Refuses a workdir in which another configuration has trained.

    Raises:
      ValueError: it has a stage that this run has not, or one of other settings, or after other stages.
    """
    names = [name for name, _ in config.order()]
    folder = workdir / "checkpoints"
    others = sorted(path.name for path in folder.iterdir() if path.name not in names) if folder.is_dir() else []
    if others:
        raise ValueError(
            f"{workdir} has checkpoints of the stage {others[0]}, which this configuration does not run; use a new "
            "--workdir"
        )
    for name in names:
        check_configuration(workdir, name, config.digest(name))


def _write_outputs(whole: Run, results: list[StageResult]) -> dict[str, Any]:
    parts = sharding.host_values(whole.parts) if jax.process_count() > 1 and whole.config.stages else whole.parts
    if jax.process_index() == 0 and whole.config.stages:
        export_system(whole.system, parts, whole.workdir / "export", np.float32)
    summary = write_summary(
        whole.workdir,
        preset=whole.config.preset,
        seed=whole.config.seed,
        stages=[result.record() for result in results],
    )
    if jax.process_index() == 0:
        write_report(whole.workdir)
    processes.wait_for_all("outputs written")
    return summary
