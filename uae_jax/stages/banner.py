"""What a run says before it starts: device, mesh, model, data, stages with their parameters, and where files go."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

import uae_jax
from uae_jax import sharding, trees
from uae_jax.methods.trained import trainable
from uae_jax.models.uae import UAE
from uae_jax.stages.run_config import RunConfig


def machine_lines(config: RunConfig, workdir: pathlib.Path) -> list[str]:
    """Device, mesh, model, data and workdir, a line each."""
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


def count_line(name: str, settings: Any, trained: int, frozen: int) -> str:
    """Steps, images and parameters of a stage, under `COUNTS`."""
    images = settings.steps * settings.batch_size
    return f"{name:14} {settings.steps:>7,} {images:>9,} {trained:>15,} {frozen:>15,}"


COUNTS = f"{'stage':14} {'steps':>7} {'images':>9} {'trained':>15} {'frozen':>15}"


def stage_lines(config: RunConfig, model: UAE, parts: Mapping, key: jax.Array) -> list[str]:
    """A line for each stage, with the numbers of parameters; one line where there is none.

    Args:
      config: of the run.
      model: for the modules that a new adapter changes.
      parts: the model's dictionary before the first stage.
      key: of new adapters; their values are not computed.
    """
    if not config.stages:
        return ["no stages: the model is scored alone"]
    lines = [COUNTS]
    for name, stage in config.order():
        rank, names = getattr(config.stage(stage), "lora_rank", 1), config.trains(stage)
        shapes = jax.eval_shape(
            lambda parts, names=names, rank=rank: trainable(model, parts, names, rank, key), dict(parts)
        )
        others = {part: tree for part, tree in parts.items() if part not in shapes}
        counts = trees.parameter_count(shapes), trees.parameter_count(others)
        lines.append(count_line(name, config.stage(stage), *counts))
    return lines


def banner(config: RunConfig, workdir: pathlib.Path) -> list[str]:
    """What is known before the weights are read."""
    versions = f"uae_jax {uae_jax.__version__}, jax {jax.__version__}, preset {config.preset}, seed {config.seed}"
    return [versions, *machine_lines(config, workdir)]


FILES = (
    "files:   metrics.jsonl, tensorboard/, samples/ and checkpoints/ as the run goes on; report.html, summary.json and",
    "         export/ after each stage",
    "Ctrl-C:  stops after the step under way; the same command continues there",
)
