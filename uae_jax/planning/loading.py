"""Bytes of reading a model's weights, before its first step: what stays on a device, and what passes through a host."""

import dataclasses
import math
import pathlib
from typing import Any

import jax

from uae_jax import trees
from uae_jax.files.json_files import read_json
from uae_jax.methods.trained import STORABLE, stored
from uae_jax.models.encoders import clip
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig
from uae_jax.models.janus import config as janus_config
from uae_jax.planning.chips import GIB, Topology
from uae_jax.planning.estimate import share
from uae_jax.planning.published import TEXT_ENCODERS
from uae_jax.planning.roofline import MeshSizes
from uae_jax.stages.kinds import AnyAbstract
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import model_folder

FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Loading:
    """Bytes of reading all parts, each in the precision in which the first stage holds it.

    Attributes:
      device: of the parameters on each device, once all are read.
      host: in one process at most, without its libraries; the parameters too where the devices are the host's own.
      largest: name of what the host's peak is for.
    """

    device: float
    host: float
    largest: str

    def line(self) -> str:
        """One line for the table."""
        return (
            f"Reading the weights: {self.device / GIB:.2f} GiB on each device; a process's host needs at most "
            f"{self.host / GIB:.2f} GiB beside its libraries, for {self.largest}."
        )


def plan_loading(config: RunConfig, system: AnyAbstract, topology: Topology, sizes: MeshSizes) -> Loading:
    """The bytes of `stages.weights.load_system` in a run, which places one shard of one parameter at a time.

    Files are taken to be float32, which bounds the pages of the tensor that is read.

    Args:
      config: of the run.
      system: without weights, with the run's adapters.
      topology: where it runs; faked devices are in one process.
      sizes: of the mesh.
    """
    parts, faked = held_parts(config, system), topology.kind == "cpu"
    device = share(parts, sizes)
    reads = _reads(parts, sizes, topology.devices * device if faked else 0.0)
    alone = MeshSizes(1, 1, 1)
    for name, tower in _towers(config).items():  # each is gone before the next is read
        reads |= _reads({name: tower}, alone, share(tower, alone) if faked else 0.0)
    largest = max(reads, key=lambda name: reads[name])
    return Loading(device, reads[largest], largest)


def _reads(tree: Any, sizes: MeshSizes, beside: float) -> dict[str, float]:
    """Bytes of the host while each parameter is read: a shard, its stored tensor, and what else is there."""
    leaves = trees.flatten(tree).items()
    return {name: beside + share({name: leaf}, sizes) + _pages(leaf) for name, leaf in leaves}


def held_parts(config: RunConfig, system: AnyAbstract) -> Any:
    """Shapes of the parts in the precisions in which a run reads them."""
    needed = set(STORABLE) - config.frozen_from_start()
    return jax.eval_shape(lambda parts: stored(parts, needed, config.model.frozen_dtype), system.parts)


def _pages(leaf: Any) -> int:
    """Bytes of one stored tensor of a parameter; that of stacked matrices has one for each layer."""
    shape = leaf.shape[1:] if len(leaf.shape) == 3 else leaf.shape
    return FLOAT * math.prod(shape)


def _towers(config: RunConfig) -> dict[str, Any]:
    """Shapes of the text encoders, whose vector of the empty prompt is all that stays."""
    settings, names = config.model, ("text_encoder", "text_encoder_2")
    if settings.sizes in janus_config.SIZES:
        return {}
    configs: dict[str, Any] = dict(zip(names, TEXT_ENCODERS))
    if settings.sizes and not settings.folder and "sd3" not in settings.sizes:
        return {}
    if settings.folder or not settings.sizes:
        folder = model_folder(settings.folder) / "SD3"
        configs = {name: _config(folder / name) for name in names if (folder / name / "config.json").is_file()}
    return {name: clip.abstract_params(text) for name, text in configs.items()}


def _config(folder: pathlib.Path) -> CLIPTextConfig | CLIPConfig:
    whole = read_json(folder).get("model_type") == "clip"
    return CLIPConfig.from_folder(folder) if whole else CLIPTextConfig.from_folder(folder)
