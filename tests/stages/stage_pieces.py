"""Runs and their stages in pieces that a test can call one by one."""

import copy
import dataclasses
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.stages import run as run_module
from uae_jax.stages.settings import frozen
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import init_state


def changed(config: dict, **sections) -> dict:
    """A copy with the given values in its sections: `changed(config, gen_for_und=dict(group_size=1), seed=1)`."""
    values = copy.deepcopy(config)
    for name, value in sections.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values[name] = value
    return values


def make_run(config: dict, workdir, devices: int = 1) -> run_module.Run:
    """A `Run` on the first so many of the faked devices."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
        return run_module.Run(frozen(run_module.RunConfig, config), workdir)


def stage_of(run: run_module.Run, stage: str, **changes) -> types.SimpleNamespace:
    """A stage's pieces, ready to call: config, policy, state, frozen, batch, key, and `step()` (state is donated)."""
    config = dataclasses.replace(getattr(run.config, stage), **changes)
    run = copy.copy(run)  # other stages and tests keep their settings
    run.config = dataclasses.replace(run.config, **{stage: config})
    start = run_module.STAGES[stage][1](run.parts, config, jax.random.key(5))
    optimizer = make_optimizer(config.optimizer, 10)
    rows = [run.rows(index, run.source[index]) for index in range(config.batch_size)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return types.SimpleNamespace(
        config=config, policy=run.policy(stage) if stage in run_module.RL_STAGES else None, trained=start,
        frozen={name: value for name, value in run.parts.items() if name not in start},
        batch=sharding.shard_batch(batch, run.mesh), key=jax.random.key(7),
        state=lambda params=start: sharding.shard_tree(init_state(params, optimizer, ema=bool(config.ema_decay)), run.mesh),
        step=lambda state: run.step(stage, state, optimizer))


def nudged(adapter, seed: int = 0, size: float = 0.02):
    """An adapter that is not zero any more."""
    def move(name, leaf):
        noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(leaf.shape)
        return jnp.asarray(leaf + size * noise, jnp.float32)
    return trees.map_with_name(move, adapter)


def largest_gap(a, b) -> float:
    """Largest difference between two trees, relative to the largest number of its leaf."""
    def gap(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1e-12)
    return max(jax.tree.leaves(jax.tree.map(gap, a, b)))
