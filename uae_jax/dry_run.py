"""What a run would do: all mistakes at once, device, mesh, stages, parameters, bytes, and the first rows of data."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uae_jax import sharding, trees
from uae_jax.data.tokenizer import decode_caption, load_tokenizer
from uae_jax.planning.estimate import estimate_memory
from uae_jax.planning.roofline import MeshSizes
from uae_jax.settings import one_line
from uae_jax.stages.abstract import AbstractSystem
from uae_jax.stages.checks import check_run
from uae_jax.stages.data import few_images, open_data, row_builder, unknown_captions
from uae_jax.stages.program import Program, make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import model_folder, processor_folder

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
    print("\n".join([*_machine(settings, workdir), *_stages(settings, system), *_rows(settings, system)]))


def _machine(config: RunConfig, workdir: pathlib.Path) -> list[str]:
    mesh = sharding.make_mesh(config.mesh)
    device = jax.devices()[0]
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    place = config.data.folder or ", ".join(config.data.mixture) or config.data.name
    state = "continues" if (workdir / "checkpoints").is_dir() else "new"
    return [
        f"device:  {len(jax.devices())} x {device.device_kind} ({device.platform})",
        f"mesh:    {sizes}",
        f"model:   {config.model.folder or 'built in'}, activations {config.model.dtype}",
        f"data:    {config.data.source} {place}".rstrip(),
        f"workdir: {workdir} ({state})",
    ]


def _stages(config: RunConfig, system: AbstractSystem) -> list[str]:
    """One line a stage: steps, images, parameters, and the estimated bytes of a device."""
    if not config.stages:
        return ["", "no stages: the model is scored alone"]
    mesh = sharding.make_mesh(config.mesh)
    sizes = MeshSizes(**mesh.shape)
    header = f"{'stage':14} {'steps':>7} {'images':>9} {'trained':>12} {'frozen':>14} {'GiB a device':>13}"
    lines = ["", header]
    for name, stage in config.order():
        program = make_program(config, system, system.parts, system.batch, stage)
        lines.append(f"{name:14} {_counts(program)} {_gib(config, system, program, sizes):>13}")
    return [*lines, "GiB a device are estimated; python -m uae_jax.plan compiles them"]


def _counts(program: Program) -> str:
    steps, images = program.config.steps, program.config.steps * program.config.batch_size
    trained, frozen = trees.parameter_count(program.state.params), trees.parameter_count(program.frozen)
    return f"{steps:>7,} {images:>9,} {trained:>12,} {frozen:>14,}"


def _gib(config: RunConfig, system: AbstractSystem, program: Program, sizes: MeshSizes) -> str:
    return f"{estimate_memory(program, config, sizes, system).peak / GIB:.3f}"


def _rows(config: RunConfig, system: AbstractSystem) -> list[str]:
    """The first images with their captions as the model will see them."""
    heldout = config.evaluation.images if config.data.source == "folder" else 1  # of others nothing would be told
    data = open_data(config.data, config.seed, heldout, check=False)
    source = data.train
    words = processor_folder(model_folder(config.model.folder))
    tokenizer = load_tokenizer(words, config.data.control_tokens)
    rows = row_builder(config.data, tokenizer, system.processor)
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
        caption = decode_caption(tokenizer, np.asarray(row["caption_ids"])[:tokens].tolist())
        cut = ", cut at the longest length" if row["caption_truncated"] else ""
        lines.append(f"  {example.id}: {side} x {side} pixels, {tokens} tokens{cut}: {caption}")
    notes = [*few_images(config, source), *unknown_captions(config, data, tokenizer)]
    return [*lines, *(f"note: {note}" for note in notes)]
