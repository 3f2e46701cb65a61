"""Finds the mistakes of a run before any weight is read: settings, data, model folder, encoders, mesh, workdir.

Every check is made, whatever the others find, so that all mistakes are told at once.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from uae_jax import sharding
from uae_jax.files.paths import is_url, problem, to_path
from uae_jax.methods import STAGES
from uae_jax.methods.method import network_of
from uae_jax.settings import Mistakes, one_line, read
from uae_jax.stages import precomputed
from uae_jax.stages.abstract import with_run_adapters
from uae_jax.stages.data import OpenedData, open_data
from uae_jax.stages.folders.check import check_folder
from uae_jax.stages.folders.parts import NEW_PROJECTOR, find_parts, weights_digest
from uae_jax.stages.kinds import AnyAbstract, abstract_folder, kind_of, kind_of_model
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.understanding import open_questions
from uae_jax.stages.weights import ENCODERS, model_folder

EXPECTED = (ValueError, OSError, ImportError)
FIRST_CAPTIONS = 16  # looked at before a folder is read as a whole


def checked_config(config: Mapping[str, Any], workdir: pathlib.Path, mistakes: Sequence[str] = ()) -> RunConfig:
    """The settings of a run, after all checks that need no weights.

    Raises:
      Mistakes: one line each.
    """
    return check_run(config, workdir, mistakes)[0]


def check_run(
    config: Mapping[str, Any], workdir: pathlib.Path, mistakes: Sequence[str] = (), *, thorough: bool = False
) -> tuple[RunConfig, AnyAbstract]:
    """The settings of a run and the shapes of its model, after all checks that need no weights.

    Args:
      config: of a file in `configs/`.
      workdir: of the run.
      mistakes: found before, such as those of the command line.
      thorough: look at the model folder, which takes seconds, also where mistakes were found in an instant.

    Raises:
      Mistakes: one line each.
    """
    settings, found = read_config(config)
    found = [*mistakes, *found, *find_mistakes(settings, workdir)]
    for notice in notices(settings):
        print(f"note: {notice}", file=sys.stderr)
    if found and not thorough:
        raise Mistakes(found)
    system, more = read_model(settings)
    if system is None or found or more:
        raise Mistakes(list(dict.fromkeys([*found, *more])))
    check_programs(settings, system)
    return settings, system


def read_config(config: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The settings of a configuration file, with defaults where they are wrong, and all mistakes.

    Of stages that are wrong, those that exist are kept, so that the mistakes of their settings are found too.
    """
    made, mistakes = read(RunConfig, config)
    settings, wanted = made or RunConfig(), config.get("stages", ())
    if isinstance(wanted, list | tuple) and not settings.stages:
        settings = dataclasses.replace(settings, stages=tuple(name for name in wanted if name in STAGES))
    return with_alignment(settings), mistakes


def with_alignment(config: RunConfig) -> RunConfig:
    """The settings with the stage `align` before `pretrain`, where the model folder has a new projector."""
    if "pretrain" not in config.stages or "align" in config.stages:
        return config
    if not (config.stage("align").after_import and _has_new_projector(config)):
        return config
    print(
        f"note: {config.model.folder}/llm has a new projector: the stage align trains it first; "
        "--config.align.after_import=False leaves that out",
        file=sys.stderr,
    )
    at = config.stages.index("pretrain")
    return dataclasses.replace(config, stages=(*config.stages[:at], "align", *config.stages[at:]))


def _has_new_projector(config: RunConfig) -> bool:
    """Whether `convert import` has made the projector of the model folder."""
    return bool(config.model.folder) and (to_path(config.model.folder) / "llm" / NEW_PROJECTOR).is_file()


def find_mistakes(config: RunConfig, workdir: pathlib.Path | None) -> list[str]:
    """The mistakes that are found in an instant, one line each: batches, encoders, data, workdir.

    Args:
      config: of the run, every setting in its range.
      workdir: of the run; None leaves it unchecked.
    """
    checks = [_check_batches, _check_kind, _check_projector, _check_encoders, _check_data, _check_questions]
    if workdir is not None:
        checks.append(lambda config: _check_workdir(config, workdir))
    return _all(config, checks)


def read_model(config: RunConfig) -> tuple[AnyAbstract | None, list[str]]:
    """The shapes of the model folder, and its mistakes with those of precomputed inputs, one line each.

    Configs are read, and the headers of all weight files against them. This takes seconds: every part is traced.
    """
    if not config.model.folder and config.model.sizes:
        return None, []  # said by `_check_encoders`
    found = _all(config, [_check_files])
    try:
        system = with_run_adapters(config, abstract_folder(config))
    except EXPECTED as error:
        return None, list(dict.fromkeys([*found, one_line(error)]))
    checks = [precomputed.mistakes, kind_of_model(system.model).mistakes]
    return system, found + _all(config, [functools.partial(check, model=system.model) for check in checks])


def _all(config: RunConfig, checks: Sequence[Callable[[RunConfig], Iterator[str]]]) -> list[str]:
    found: list[str] = []
    for check in checks:
        try:
            found += check(config)
        except EXPECTED as error:
            found.append(one_line(error))
    return list(dict.fromkeys(found))


def notices(config: RunConfig) -> list[str]:
    """What a run does other than its settings say, one line each."""
    found = []
    for stage in config.distinct_stages():
        settings = config.stage(stage)
        optimizer, total = settings.optimizer, settings.total_updates
        warmup = optimizer.warmup_of(total)
        if warmup != optimizer.warmup_steps:
            found.append(
                f"{stage}: the warm-up is shortened from {optimizer.warmup_steps} to {warmup} updates, since the stage "
                f"has {total}"
            )
    with contextlib.suppress(*EXPECTED):  # a folder that cannot be read is a mistake, and told as one
        found += precomputed.notes(config)
    return found


def check_programs(config: RunConfig, system: AnyAbstract) -> None:
    """Traces the step of every stage without computing, so that a setting of the last one does not fail late.

    Raises:
      Mistakes: settings with which a step cannot be built, one line each.
    """
    found = []
    with sharding.in_use(sharding.make_mesh(config.mesh)):
        for stage in config.distinct_stages():
            try:
                program = make_program(config, system, system.parts, system.batch, stage)
                jax.eval_shape(program.step, *program.arguments)
            except ValueError as error:
                found.append(f"{stage}: {one_line(error)}")
    if found:
        raise Mistakes(found)


def check_batch(config: RunConfig, stage: str, ways: int) -> None:
    """Checks that a stage's batch can be split as its settings say.

    Args:
      config: of the run; stage: its name.
      ways: devices that share the batch.

    Raises:
      ValueError: images do not divide over the devices, or samples into updates and micro-batches.
    """
    settings = config.stage(stage)
    parts = settings.updates_per_rollout * settings.micro_batches
    samples = settings.batch_size * settings.samples_per_image
    if settings.batch_size % ways or samples % parts:
        raise ValueError(
            f"config.{stage}.batch_size is {settings.batch_size}; it must be a multiple of the {ways} devices that "
            f"share the batch, and its {samples} samples one of updates_per_rollout * micro_batches = {parts}"
        )


def _check_batches(config: RunConfig) -> Iterator[str]:
    mesh = sharding.make_mesh(config.mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for stage in config.distinct_stages():
        try:
            check_batch(config, stage, ways)
        except ValueError as error:
            yield str(error)


def _check_files(config: RunConfig) -> Iterator[str]:
    for row in check_folder(find_parts(model_folder(config.model.folder)), fast=True):
        yield from row.problems


def _check_kind(config: RunConfig) -> Iterator[str]:
    """Stages that train another kind of model, and what this kind does not do."""
    if not config.model.folder and config.model.sizes:
        return  # said by `_check_encoders`
    kind = kind_of(config.model.folder)
    for stage in config.distinct_stages():
        if _network(config, stage) is not kind.network:
            yield (
                f"{stage} does not train what {model_folder(config.model.folder)} holds ({kind.title}); its stages are "
                f"{', '.join(kind.stages)}: change config.stages, or config.model.folder"
            )
    if config.evaluation.questions and not kind.questions:
        yield (
            f"config.evaluation.questions is {config.evaluation.questions!r}, but {kind.title}, answers none during a "
            "run; leave it empty"
        )


def _check_projector(config: RunConfig) -> Iterator[str]:
    """Through a random projector a decoder draws noise, and its rewards say nothing of a caption."""
    trained = {name for stage in config.distinct_stages() for name in config.trains(stage)}
    if _has_new_projector(config) and "projector" not in trained:
        yield (
            f"{config.model.folder}/llm has a new projector, which is random, and no stage of config.stages trains it; "
            "put 'align' in front of them, or take a folder whose projector is trained"
        )


def _network(config: RunConfig, stage: str) -> type:
    """The type of the description of the models that a stage trains."""
    return network_of(STAGES[stage].method(config.stage(stage)))


def _check_encoders(config: RunConfig) -> Iterator[str]:
    if not config.model.folder and config.model.sizes:
        yield (
            f"config.model.folder is empty; give a folder with the weights of {config.model.sizes} (docs/weights.md "
            "says where they are)"
        )
        return
    folder = model_folder(config.model.folder)
    present = {name for name in ENCODERS if (folder / name).is_dir()}
    wanted = {name: "evaluation.encoders" for name in config.evaluation.encoders}
    for stage in config.distinct_stages():
        reward = getattr(config.stage(stage), "reward", None)
        wanted |= {name: f"{stage}.reward.names" for name in (reward.names if reward else ())}
        if reward and reward.caption_weight and not config.model.caption_scorer:
            yield (
                f"config.{stage}.reward.caption_weight needs config.model.caption_scorer, a folder that "
                "configs/bootstrap.py makes with --config.phases=\"('caption_scorer',)\" --config.start=builtin"
            )
    for name, field in sorted(wanted.items()):
        if name not in present:
            yield f"config.{field} needs the image encoder {name!r}; put it at {folder / name}"


def _check_data(config: RunConfig) -> Iterator[str]:
    yield from missing_captions(config, open_data(config.data, config.seed, 1, check=False))


def missing_captions(config: RunConfig, data: OpenedData) -> Iterator[str]:
    """A line for each training folder that lacks a caption where a stage needs one.

    Where captions lie beside the images they are all looked at; where they lie in one file with them, the first few
    are, until the folder is checked as a whole.
    """
    needing = [stage for stage in config.distinct_stages() if config.needs_captions(stage)]
    networks = {_network(config, stage) for stage in needing}
    others = [name for name in STAGES if _network(config, name) in networks and not config.needs_captions(name)]
    for folder in data.folders[: data.trained_folders] if needing else ():
        source = folder.source
        records = source.records
        few = None if records.captions_at_hand or folder.inspection else FIRST_CAPTIONS
        record = source.without_caption(few)
        if record is not None:
            run = f"{', '.join(others)} would run without (--config.stages={','.join(others)})" if others else ""
            yield (
                f"{records.folder / records.name_of(record)} has no caption ({records.folder} is {records.title}), and "
                f"{' and '.join(needing)} need{'s' if len(needing) == 1 else ''} captions: {records.remedy(record)}"
                + (f"; {run}" if run else "")
            )


def _check_questions(config: RunConfig) -> Iterator[str]:
    open_questions(config.evaluation, config.data)
    yield from ()


def _check_workdir(config: RunConfig, workdir: pathlib.Path) -> Iterator[str]:
    """A workdir whose parent is absent, that cannot be written, or in which another configuration has trained."""
    if found := problem(workdir, write=True) or (_unsaved(workdir) if config.stages else ""):
        yield found
        return
    if not is_url(workdir) and not workdir.parent.is_dir():
        yield f"the folder {workdir.parent} that --workdir needs does not exist; make it first"
        return
    if workdir.exists() and not workdir.is_dir():
        yield f"{workdir} is a file; name a folder as --workdir"
        return
    place = workdir if workdir.exists() else workdir.parent
    if not is_url(workdir) and not os.access(place, os.W_OK):
        yield f"{place} cannot be written; choose another --workdir"
    names = [name for name, _ in config.order()]
    folder = workdir / "checkpoints"
    others = sorted(path.name for path in folder.iterdir() if path.name not in names) if folder.is_dir() else []
    if others:
        yield (
            f"{workdir} has checkpoints of the stage {others[0]}, which this configuration does not run; use a new "
            "--workdir"
        )
        return
    if not folder.is_dir():
        return
    from uae_jax.training.records import check_configuration  # checkpointing takes a second to import

    weights = weights_digest(model_folder(config.model.folder))
    for name, stage in config.order():
        identity, free = stage_identity(config, name, weights), config.free(name)
        check_configuration(workdir, name, identity, free=free, steps=config.stage(stage).steps)


def _unsaved(workdir: pathlib.Path) -> str:
    """Why no checkpoint can be written into a workdir; empty where one can."""
    if is_url(workdir) and not os.fspath(workdir).startswith("gs://"):
        return (
            f"--workdir={workdir}: Orbax writes no checkpoints to this kind of bucket; give a folder, a mount of the "
            "bucket, or gs:// (data, weights and exports may lie there)"
        )
    return ""


def stage_identity(config: RunConfig, name: str, weights: str) -> dict[str, Any]:
    """Everything that changes the numbers of a stage, the weights that the run begins with included.

    The weights count by their contents, so that a folder may be moved.

    Args:
      config: of the run.
      name: of the run's `order`.
      weights: `folders.parts.weights_digest` of its model folder.
    """
    return config.identity(name) | {"contents of model.folder": weights}
