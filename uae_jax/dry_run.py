"""What a run would do: all mistakes at once, device, mesh, stages, parameters, bytes, and the first rows of data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uae_jax import sharding, trees
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.roofline import MeshSizes
from uae_jax.settings import one_line
from uae_jax.stages.banner import COUNTS, count_line, machine_lines
from uae_jax.stages.checks import check_run
from uae_jax.stages.data import few_images, open_data, unknown_captions
from uae_jax.stages.kinds import AnyAbstract, kind_of
from uae_jax.stages.program import Program, make_program
from uae_jax.stages.run_config import RunConfig

ROWS = 3
GIB = 2**30


def dry_run(config: Mapping[str, Any], workdir: pathlib.Path, mistakes: Sequence[str]) -> None:
    """Prints what a run would do.

    Args:
      config: of a file in `configs/`.
      workdir: of the run; nothing is written there.
      mistakes: those that reading the command line has found.

    Raises:
      Mistakes: all of them, one line each.
    """
    settings, system = check_run(config, workdir, mistakes, thorough=True)
    print("\n".join([*machine_lines(settings, workdir), *_stages(settings, system), *_rows(settings, system)]))


def _stages(config: RunConfig, system: AnyAbstract) -> list[str]:
    """One line a stage: steps, images, parameters, and the estimated bytes of a device."""
    if not config.stages:
        return ["", "no stages: the model is scored alone"]
    mesh = sharding.make_mesh(config.mesh)
    sizes = MeshSizes(**mesh.shape)
    lines = ["", f"{COUNTS} {'GiB a device':>13}"]
    for name, stage in config.order():
        program = make_program(config, system, system.parts, system.batch, stage)
        counts = trees.parameter_count(program.state.params), trees.parameter_count(program.frozen)
        line = count_line(name, program.config, *counts)
        lines.append(f"{line} {_gib(config, system, program, sizes):>13}")
    return [*lines, "GiB a device are estimated; python -m uae_jax.plan compiles them"]


def _gib(config: RunConfig, system: AnyAbstract, program: Program, sizes: MeshSizes) -> str:
    return f"{estimate_memory(program, config, sizes, system).peak / GIB:.3f}"


def _rows(config: RunConfig, system: AnyAbstract) -> list[str]:
    """The first images with their captions as the model will see them."""
    heldout = config.evaluation.images if config.data.source == "folder" else 1  # of others nothing would be told
    data = open_data(config.data, config.seed, heldout, check=False)
    source = data.train
    rows = kind_of(config.model.folder).rows(config.data, system)
    side, lines = config.data.image_size, ["", *data.lines, f"data, the first of {len(source):,} rows:"]
    for index in range(min(ROWS, len(source))):
        try:
            example = source[index]
        except (ValueError, OSError) as error:
            lines.append(f"  row {index} would be left out or refused: {one_line(error)}")
            continue
        row = rows(index, example)
        if not example.caption:
            lines.append(f"  {example.id}: {side} x {side} pixels, no caption")
            continue
        tokens = int(row["caption_mask"].sum())
        caption = rows.decode(np.asarray(row["caption_ids"])[:tokens].tolist())
        cut = ", cut at the longest length" if row["caption_truncated"] else ""
        lines.append(f"  {example.id}: {side} x {side} pixels, {tokens} tokens{cut}: {caption}")
    notes = [*few_images(config, source), *unknown_captions(config, data, rows)]
    return [*lines, *(f"note: {note}" for note in notes)]
