"""Runs and their stages in pieces that a test can call one by one."""

import copy
import dataclasses
import pathlib
import types
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import distributed
from jax.sharding import NamedSharding, PartitionSpec

from configs.presets import merged
from uae_jax import convert, sharding, trees
from uae_jax.data.loader import make_loader
from uae_jax.methods.method import Method, build_step, make_method
from uae_jax.methods.method import start_of as start_state
from uae_jax.methods.trained import trainable
from uae_jax.settings import as_dict, frozen
from uae_jax.stages import run as run_module
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.optimizer import make_optimizer


def exported(source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The export of a workdir for the PyTorch libraries, in files of at most 20 kB."""
    convert.main(["export", str(source), str(out), "--layout", "hub", "--max-shard-gb", "2e-5"])
    return out


def changed(config: dict, **sections) -> dict:
    """A copy with the given values in its sections: `changed(config, gen_for_und=dict(group_size=1), seed=1)`."""
    return merged(copy.deepcopy(config), sections)


def exit_of(command: Callable, *arguments: str) -> Any:
    """Exit code, or the message, of a command in this process."""
    try:
        command(list(arguments))
    except SystemExit as stop:
        return stop.code
    return 0


def replaced(settings: Any, **changes) -> Any:
    """Settings with other values, nested ones too: `replaced(stage, batch_size=2, nft=dict(levels=3))`."""
    return frozen(type(settings), changed(as_dict(settings), **changes))


def varied(method: Method, **changes) -> Any:
    """A method with other settings."""
    return dataclasses.replace(method, settings=replaced(method.settings, **changes))


def make_run(config: dict, workdir, devices: int = 1) -> run_module.Run:
    """A `Run` on the first so many of the faked devices."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:devices]))
        return run_module.Run(frozen(RunConfig, config), workdir)


def start_of(run: run_module.Run, stage: str) -> dict:
    """What a stage trains, as it begins."""
    rank = getattr(run.config.stage(stage), "lora_rank", 1)
    return trainable(run.system.model, run.parts, run.config.trains(stage), rank, jax.random.key(5))


def step_of(run: run_module.Run, stage: str, state: Any, optimizer: Any) -> Any:
    """The compiled train step of a stage, as a run builds it."""
    method = make_method(stage, run.config.stage(stage), run.config.sampler, run.system)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(run.mesh, PartitionSpec())
    return build_step(method, optimizer, shardings)


STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
_ADAPTERS = {"gen_for_und": "language_lora", "und_for_gen": "transformer_lora"}


def linear(config: dict) -> dict:
    """Adam with an epsilon so large that its step is the gradient, times 1 or 0.001: rounding stays rounding.

    Rewards a few thousandths apart are normalised to advantages, so the gradient of captions carries their rounding
    magnified; its step is as small, beside the parameters, as steps are in training.
    """
    values = dict(eps=1e3, max_grad_norm=0.0, weight_decay=0.0)

    def optimizer(name: str) -> dict:
        return config[name]["optimizer"] | values | dict(learning_rate=1.0 if name == "gen_for_und" else 1e3)

    once = dict(updates_per_rollout=1)
    own = {name: once for name in STAGES if name != "und_for_gen"} | {"und_for_gen": dict(flow_grpo=once)}
    return changed(config, **{name: dict(own[name], optimizer=optimizer(name)) for name in STAGES})


def one_step(run: run_module.Run, stage: str) -> tuple[dict, dict, dict]:
    """The first step of a stage with the run's own loader, on its mesh, in all of its processes.

    Returns:
      Updated parameters, their changes (numpy), and metrics (numbers).
    """
    run = copy.copy(run)  # other stages keep their adapters
    run.parts = dict(run.parts)
    if stage in _ADAPTERS:  # an adapter that is not zero: gradients reach both of its factors
        adapter = sharding.host_values(run.parts[_ADAPTERS[stage]])
        run.parts[_ADAPTERS[stage]] = sharding.shard_tree(jax.tree.map(np.asarray, nudged(adapter)), run.mesh)
    config, key = run.config.stage(stage), jax.random.key(7)
    start = start_of(run, stage)
    optimizer = make_optimizer(config.optimizer, 10)
    before = sharding.host_values(start)
    frozen_parts = {name: value for name, value in run.parts.items() if name not in start}
    state = sharding.make_on(run.mesh, lambda parts: start_state(parts, optimizer, config), start)
    index, count = sharding.batch_slice(run.mesh)
    rows = next(make_loader(run.source, run.rows, config.batch_size, process_index=index, process_count=count))
    with sharding.in_use(run.mesh):
        arguments = (state, frozen_parts, sharding.shard_batch(rows, run.mesh), sharding.replicate_key(key, run.mesh))
        step = step_of(run, stage, state, optimizer).lower(*arguments).compile()
        if jax.process_count() > 1:  # collectives on CPU wait half a minute for a process that still compiles
            distributed.global_state.client.wait_at_barrier(f"{stage} is compiled", 600_000)
        state, metrics = step(*arguments)
    after = sharding.host_values(state.params)
    numbers = {name: float(value) for name, value in metrics.items()}
    return after, jax.tree.map(lambda new, old: new - old, after, before), numbers


def check_same_step(one: tuple, other: tuple) -> None:
    """Two results of `one_step` agree: metrics and updated parameters to 1e-5, the changes alone to what rounding
    allows.

    The gradient's norm alone to 5e-5: advantages divide rounding of the rewards by a group's spread.
    """
    numbers, gaps = (
        [{name: value for name, value in step[2].items() if ("_gap" in name) == of_gaps} for step in (one, other)]
        for of_gaps in (False, True)
    )
    norms = [found.pop("grad_norm", 0.0) for found in numbers]
    assert norms[1] == pytest.approx(norms[0], rel=5e-5)
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=2e-6)
    assert gaps[1] == pytest.approx(gaps[0], abs=2e-5)  # they are rounding themselves
    assert largest_gap(one[0], other[0]) < 1e-5
    assert largest_gap(one[1], other[1]) < 1e-3
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(one[1])) > 1e-4


def stage_of(run: run_module.Run, stage: str, **changes) -> types.SimpleNamespace:
    """A stage's pieces, ready to call: config, method, trained, frozen, batch, key, `state()`, and `step(state)`."""
    config = replaced(run.config.stage(stage), **changes)
    run = copy.copy(run)  # other stages and tests keep their settings
    run.config = dataclasses.replace(run.config, stage_settings={**run.config.stage_settings, stage: config})
    start = start_of(run, stage)
    optimizer = make_optimizer(config.optimizer, 10)
    rows = [run.rows(index, run.source[index]) for index in range(config.batch_size)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return types.SimpleNamespace(
        config=config,
        method=make_method(stage, config, run.config.sampler, run.system),
        trained=start,
        frozen={name: value for name, value in run.parts.items() if name not in start},
        batch=sharding.shard_batch(batch, run.mesh),
        key=jax.random.key(7),
        state=lambda params=start: sharding.shard_tree(start_state(params, optimizer, config), run.mesh),
        step=lambda state: step_of(run, stage, state, optimizer),
    )


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
