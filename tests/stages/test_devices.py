"""Eight faked devices, with parameters cut over them, do what one device does."""

import jax
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, stage_of

from uae_jax import sharding

pytestmark = pytest.mark.usefixtures("quick_compilation")
MESHES = {"data8": dict(data=8, fsdp=1, tensor=1), "mixed": dict(data=2, fsdp=2, tensor=2)}


def _step(run, stage):
    """Changes of the trained parts and the metrics of one step."""
    pieces = stage_of(run, stage, updates_per_rollout=1)
    state = pieces.state()
    cut = any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state.params, pieces.frozen)))
    state, metrics = pieces.step(state)(state, pieces.frozen, pieces.batch, pieces.key)
    changes = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), state.params, pieces.trained)
    return changes, {name: float(value) for name, value in metrics.items()}, cut


@pytest.fixture(scope="module")
def linear(config):
    """Adam with an epsilon so large that its step is linear in the gradient: rounding stays rounding."""
    stages = {name: dict(optimizer=config[name]["optimizer"] | dict(eps=1e3, learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0))
              for name in ("gen_for_und", "und_for_gen")}
    return changed(config, **stages)


@pytest.fixture(scope="module")
def alone(linear, tmp_path_factory):
    run = make_run(linear, tmp_path_factory.mktemp("alone"))
    return {stage: _step(run, stage) for stage in ("gen_for_und", "und_for_gen")}


@pytest.mark.parametrize("stage, mesh", [("gen_for_und", "mixed"), ("und_for_gen", "mixed"), ("und_for_gen", "data8")])
def test_devices_do_not_change_a_step(linear, alone, tmp_path, monkeypatch, stage, mesh):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    run = make_run(changed(linear, mesh=MESHES[mesh]), tmp_path, devices=8)
    changes, metrics, cut = _step(run, stage)
    one_changes, one_metrics, _ = alone[stage]
    assert cut == (mesh == "mixed")
    assert metrics["reward"] == pytest.approx(one_metrics["reward"], rel=1e-5)
    assert metrics["caption_tokens"] == one_metrics["caption_tokens"]
    assert metrics["grad_norm"] == pytest.approx(one_metrics["grad_norm"], rel=1e-3)
    assert largest_gap(one_changes, changes) < 1e-3
