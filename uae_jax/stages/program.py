"""A stage's step and the shapes of its arguments, from shapes alone: for plans without weights, and to find mistakes
before any work.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import sharding
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.steps import RL_STAGES, STAGES, Described, held, make_step, with_drawing_policy
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import TrainState, init_state


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
      stage: a name of `STAGES`.
      mesh: where arguments lie; None leaves them without shardings.
    """
    settings = getattr(config, stage)
    optimizer = make_optimizer(settings.optimizer, settings.steps * settings.updates_per_rollout)
    parts = _with_copies(config, dict(parts), stage)
    if stage not in RL_STAGES:
        parts = with_drawing_policy(parts)
    start = jax.eval_shape(lambda parts: STAGES[stage][1](parts, settings, jax.random.key(0)), parts)
    state = jax.eval_shape(lambda parts: init_state(parts, optimizer, ema=bool(settings.ema_decay)), start)
    frozen = {name: part for name, part in parts.items() if name not in start}
    frozen = jax.eval_shape(lambda parts: held(parts, config.trained_from(stage), config.model.frozen_dtype), frozen)
    inputs, key, shardings = batch(settings.batch_size), jax.eval_shape(lambda: jax.random.key(0)), None
    if mesh is not None:
        rows, whole = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), NamedSharding(mesh, PartitionSpec())
        state, frozen = (_placed(tree, sharding.tree_shardings(tree, mesh)) for tree in (state, frozen))
        inputs = _placed(inputs, jax.tree.map(lambda leaf: rows, inputs))
        key = _placed(key, whole)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state), whole
    step = make_step(stage, settings, config.sampler, system, optimizer, shardings)
    return Program(stage, settings, step, state, frozen, inputs, key)


def _with_copies(config: RunConfig, parts: dict, stage: str) -> dict:
    """Shapes of the parts when a stage begins: with the whole copies that the RL stages before it have trained."""
    stages = [name for _, name in config.order()]
    for earlier in stages[: stages.index(stage)] if stage in stages else ():
        settings = getattr(config, earlier)
        if earlier in RL_STAGES and settings.train == "full":
            parts = parts | jax.eval_shape(
                lambda parts, make=STAGES[earlier][1], settings=settings: make(parts, settings, jax.random.key(0)),
                parts,
            )
    return parts


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings)
