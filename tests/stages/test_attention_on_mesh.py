"""A whole step in which every attention runs on each device's own rows and heads."""

import jax
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, stage_of

from uae_jax import sharding
from uae_jax.nn.attention import entry


def _gradient(config, workdir, devices):
    """Changes of the adapter by one step whose optimizer is linear in the gradient, and the reward."""
    run = make_run(config, workdir, devices)
    pieces = stage_of(run, "und_for_gen", flow_grpo=dict(updates_per_rollout=1))
    state = pieces.state()
    with jax.set_mesh(run.mesh):
        state, metrics = pieces.step(state)(state, pieces.frozen, pieces.batch, pieces.key)
    return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, pieces.trained), float(
        metrics["reward"]
    )


@pytest.mark.slow
def test_a_step_with_the_kernel_on_each_device_equals_the_plain_one(config, tmp_path, monkeypatch):
    optimizer = config["und_for_gen"]["optimizer"] | dict(
        eps=1e3, learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0
    )
    config = changed(config, und_for_gen=dict(optimizer=optimizer))
    plain, reward = _gradient(config, tmp_path / "one", 1)
    monkeypatch.setattr(sharding, "SMALL", 256)
    monkeypatch.setattr(entry, "SMALL", 0)  # nothing is small: all attention takes the form for long sequences
    calls = []
    whole = entry.IMPLEMENTATIONS["by_head"]
    monkeypatch.setitem(entry.IMPLEMENTATIONS, "by_head", lambda *x: calls.append(x[0].shape) or whole(*x))
    spread, other = _gradient(changed(config, mesh=dict(data=2, fsdp=2, tensor=2)), tmp_path / "eight", 8)
    assert calls and other == pytest.approx(reward, rel=1e-5)
    assert largest_gap(plain, spread) < 1e-3
