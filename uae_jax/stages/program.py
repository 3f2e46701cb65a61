"""A stage's step and the shapes of its arguments, from shapes alone: for plans and checks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import sharding
from uae_jax.methods.method import Described, build_step, make_method, start_of
from uae_jax.methods.trained import COPY, LORA, check_start, stored, trainable, with_policy_as_transformer
from uae_jax.models.uae import UAE
from uae_jax.rollouts.frozen_inputs import NEGATIVE, negative_shape
from uae_jax.stages.precomputed import parts_read
from uae_jax.stages.run_config import RunConfig, is_rl
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage's step and the shapes of its arguments.

    Attributes:
      stage: its name; config: its settings.
      step: the jitted `train_step`.
      state, frozen, batch, key: `jax.ShapeDtypeStruct` leaves, with shardings where there is a mesh.
    """

    stage: str
    config: Any
    step: Callable
    state: TrainState
    frozen: dict
    batch: dict
    key: jax.ShapeDtypeStruct

    @property
    def arguments(self) -> tuple:
        """Of `step`, in order."""
        return self.state, self.frozen, self.batch, self.key


def make_program(
    config: RunConfig,
    system: Described,
    parts: Mapping,
    batch: Callable[[int], dict],
    stage: str,
    mesh: Mesh | None = None,
) -> Program:
    """The step of a stage as a run builds it, from shapes.

    Args:
      config: of the run.
      system: without weights.
      parts: shapes of the model's parameters when the run begins.
      batch: shapes of a batch of so many rows.
      stage: its name.
      mesh: where arguments lie; None leaves them without shardings.

    Raises:
      FileNotFoundError, ValueError: `data.precomputed` names a folder without a manifest.
    """
    settings = config.stage(stage)
    optimizer = make_optimizer(settings.optimizer, settings.total_updates)
    parts = _with_copies(config, system.model, dict(parts), stage)
    if not is_rl(stage, config):
        parts = with_policy_as_transformer(parts)
    start = trainable_shapes(config, system.model, parts, stage)
    state = jax.eval_shape(lambda parts: start_of(parts, optimizer, settings), start)
    frozen = {name: part for name, part in parts.items() if name not in start}
    frozen = jax.eval_shape(lambda parts: stored(parts, config.trained_from(stage), config.model.frozen_dtype), frozen)
    precomputed = parts_read(config, stage)
    if "states" in precomputed:
        frozen[NEGATIVE] = negative_shape(system.model, config.data.max_caption)
    reads = config.reads(stage, precomputed)
    inputs = {name: leaf for name, leaf in batch(settings.batch_size).items() if name in reads}
    key, shardings = jax.eval_shape(lambda: jax.random.key(0)), None
    if mesh is not None:
        rows, replicated = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
        state, frozen = (_placed(tree, sharding.tree_shardings(tree, mesh)) for tree in (state, frozen))
        inputs = _placed(inputs, jax.tree.map(lambda leaf: rows, inputs))
        key = _placed(key, replicated)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state), replicated
    method = make_method(stage, settings, config.sampler, system)
    # without `nn.cpu.compiler` options: JAX refuses them in a step that is traced inside of another program
    step = build_step(method, optimizer, shardings)
    return Program(stage, settings, step, state, frozen, inputs, key)


def with_adapters(config: RunConfig, model: UAE, parts: Mapping, key: jax.Array) -> dict:
    """The parts, and new adapters for the stages that will train one: all stages then share their compiled programs.

    A stage that fine-tunes fully makes its copy when it begins, of what the stages before it have trained.

    Args:
      config: of the run.
      model: for the modules that an adapter changes.
      parts: of the loaded model.
      key: of the run.

    Raises:
      ValueError: see `methods.trained.check_start`.
    """
    found = dict(parts)
    for stage in (stage for _, stage in config.order()):
        names = config.trains(stage)
        check_start(parts, stage, names)
        adapters = [name for name in names if name.endswith(LORA)]
        found |= trainable(model, found, adapters, getattr(config.stage(stage), "lora_rank", 1), key)
    return found


def trainable_shapes(config: RunConfig, model: UAE, parts: Mapping, stage: str) -> dict:
    """Shapes of what a stage trains, from shapes of the model's parts."""
    settings, names = config.stage(stage), config.trains(stage)
    rank = getattr(settings, "lora_rank", 1)
    return jax.eval_shape(lambda parts: trainable(model, parts, names, rank, jax.random.key(0)), dict(parts))


def _with_copies(config: RunConfig, model: UAE, parts: dict, stage: str) -> dict:
    """Shapes of the parts when a stage begins: with the fully fine-tuned copies of the stages before it."""
    stages = [name for _, name in config.order()]
    for earlier in stages[: stages.index(stage)] if stage in stages else ():
        if any(name.endswith(COPY) for name in config.trains(earlier)):
            parts = parts | trainable_shapes(config, model, parts, earlier)
    return parts


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)
