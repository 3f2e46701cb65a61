"""Eight faked devices, with parameters cut over them, do what one device does, in every stage."""

import jax
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, nudged, stage_of

from uae_jax import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
MESHES = {"data8": dict(data=8, fsdp=1, tensor=1), "fsdp8": dict(data=1, fsdp=8, tensor=1), "mixed": dict(data=2, fsdp=2, tensor=2)}
TRAINED_BEFORE = {"gen_for_und": "language_lora", "und_for_gen": "transformer_lora"}


def _step(run, stage):
    """Updated parameters, their changes and the metrics of one step, on the run's mesh."""
    if stage in TRAINED_BEFORE:  # an adapter that is not zero: gradients reach both of its factors
        run.parts[TRAINED_BEFORE[stage]] = sharding.shard_tree(nudged(run.parts[TRAINED_BEFORE[stage]]), run.mesh)
    pieces = stage_of(run, stage, updates_per_rollout=1)
    state = pieces.state()
    before = jax.device_get(state.params)
    cut = any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.params, pieces.frozen)))
    with sharding.in_use(run.mesh):
        state, metrics = pieces.step(state)(state, pieces.frozen, pieces.batch, pieces.key)
    after = jax.device_get(state.params)
    changes = jax.tree.map(lambda new, old: new - old, after, before)
    return after, changes, {name: float(value) for name, value in metrics.items()}, cut


@pytest.fixture(scope="module")
def linear(config):
    """Adam with an epsilon so large that its step is the gradient: rounding stays rounding."""
    values = dict(eps=1e3, learning_rate=1e3, max_grad_norm=0.0, weight_decay=0.0)
    return changed(config, **{name: dict(optimizer=config[name]["optimizer"] | values) for name in STAGES})


@pytest.fixture(scope="module")
def alone(linear, tmp_path_factory):
    run = make_run(linear, tmp_path_factory.mktemp("alone"))
    return {stage: _step(run, stage) for stage in STAGES}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", STAGES)
def test_devices_do_not_change_a_step(linear, alone, tmp_path, monkeypatch, stage, mesh):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    run = make_run(changed(linear, mesh=MESHES[mesh]), tmp_path, devices=8)
    after, changes, metrics, cut = _step(run, stage)
    one_after, one_changes, one_metrics, _ = alone[stage]
    assert cut == (mesh != "data8")
    assert metrics == pytest.approx(one_metrics, rel=1e-5, abs=2e-6)
    assert largest_gap(one_after, after) < 1e-5
    assert largest_gap(one_changes, changes) < 1e-3
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(changes)) > 1e-4


@pytest.mark.parametrize("mesh", MESHES)
def test_advantages_are_those_of_all_groups_whatever_the_placement(mesh):
    from uae_jax.rl.advantages import group_advantages

    rewards = np.random.default_rng(0).uniform(0, 1, (8, 4)).astype(np.float32)
    placed = sharding.shard_batch(rewards, sharding.make_mesh(sharding.MeshConfig(**MESHES[mesh]), jax.devices()[:8]))
    for scale in ("group", "batch", "none"):
        one, one_metrics = jax.jit(lambda r, scale=scale: group_advantages(r, scale=scale))(rewards)
        many, many_metrics = jax.jit(lambda r, scale=scale: group_advantages(r, scale=scale))(placed)
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
        for name, pair in one_metrics.items():
            np.testing.assert_allclose(many_metrics[name], pair, rtol=1e-5)
    spread = np.std(rewards - rewards.mean(), ddof=1)
    batch, _ = group_advantages(placed, scale="batch", eps=0.0, clip=None)
    np.testing.assert_allclose(batch, (rewards - rewards.mean(1, keepdims=True)) / spread, rtol=1e-5, atol=1e-6)
