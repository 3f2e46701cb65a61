"""Eight faked devices, with parameters cut over them, do what one device does, in every stage."""

import functools

import jax
import numpy as np
import pytest
from stage_pieces import STAGES, changed, check_same_step, linear, make_run, one_step

from uae_jax import sharding
from uae_jax.rl.advantages import group_advantages

MESHES = {
    "data8": dict(data=8, fsdp=1, tensor=1),
    "fsdp8": dict(data=1, fsdp=8, tensor=1),
    "mixed": dict(data=2, fsdp=2, tensor=2),
}
LONGER = (
    ("pretrain", "mixed"),
    ("cold_start", "mixed"),
    ("und_for_gen", "mixed"),
    ("pretrain", "fsdp8"),
    ("gen_for_und", "fsdp8"),
    ("und_for_gen", "data8"),
)
PAIRS = [(stage, "mixed") for stage in STAGES if (stage, "mixed") not in LONGER] + [
    pytest.param(*pair, marks=pytest.mark.slow) for pair in LONGER
]


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    run = make_run(linear(config), tmp_path_factory.mktemp("alone"))
    return functools.cache(lambda stage: one_step(run, stage))


@pytest.mark.trap(11, 36)
@pytest.mark.parametrize("stage, mesh", PAIRS)
def test_devices_do_not_change_a_step(config, alone, tmp_path, monkeypatch, stage, mesh):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    run = make_run(changed(linear(config), mesh=MESHES[mesh]), tmp_path, devices=8)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(run.parts)) == (mesh != "data8")
    check_same_step(alone(stage), one_step(run, stage))


@pytest.mark.trap(11, 36)
@pytest.mark.parametrize("mesh", MESHES)
def test_advantages_are_those_of_all_groups_whatever_the_placement(mesh):
    rewards = np.random.default_rng(0).uniform(0, 1, (8, 4)).astype(np.float32)
    placed = sharding.shard_batch(rewards, sharding.make_mesh(sharding.MeshConfig(**MESHES[mesh]), jax.devices()[:8]))
    for scale in ("group", "batch", "none"):
        one, one_metrics = jax.jit(lambda r, scale=scale: group_advantages(r, scale=scale))(rewards)
        many, many_metrics = jax.jit(lambda r, scale=scale: group_advantages(r, scale=scale))(placed)
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
        for name, pair in one_metrics.items():
            np.testing.assert_allclose(many_metrics[name], pair, rtol=1e-5)
    spread = np.std(rewards - rewards.mean(), ddof=1)
    batch, _ = group_advantages(placed, scale="batch")
    expected = (rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4)
    np.testing.assert_allclose(batch, expected, rtol=1e-5, atol=1e-6)
