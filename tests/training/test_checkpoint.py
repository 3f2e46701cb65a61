"""Checkpoints: round trip, leftovers of a kill, messages for folders that do not fit or are damaged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uae_jax.training.checkpoint import Checkpoints
from uae_jax.training.optimizer import OptimizerConfig, make_optimizer
from uae_jax.training.step import init_state


def make_state(width=2, value=1.0, ema=False):
    params = {"dense": {"kernel": jnp.full((3, width), value), "bias": jnp.zeros(width)}}
    return init_state(params, make_optimizer(OptimizerConfig(), 10), ema=ema)


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_keeps_the_newest(tmp_path, ema):
    with Checkpoints(tmp_path / "stage", keep=2) as checkpoints:
        assert checkpoints.restore(make_state(ema=ema)) is None
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(value=float(step), ema=ema), {"next_index": step + 1}, {"seconds": 1.5})
            checkpoints.wait()
    with Checkpoints(tmp_path / "stage") as checkpoints:
        found = checkpoints.restore(make_state(ema=ema))
        assert (found.step, found.data, found.meta) == (3, {"next_index": 4}, {"seconds": 1.5})
        assert jax.tree.structure(found.state) == jax.tree.structure(make_state(ema=ema))
        jax.tree.map(np.testing.assert_array_equal, found.state, make_state(value=3.0, ema=ema))
        assert checkpoints.restore(make_state(ema=ema), 2).step == 2
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 1; it has \[2, 3\]"):
            checkpoints.restore(make_state(ema=ema), 1)


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    state = init_state({"w": jnp.arange(1_000_000.0)}, optax.sgd(0.1))
    change = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnames="state")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(3):
            state = change(state)
        found = checkpoints.restore(state)
    np.testing.assert_array_equal(found.state.params["w"], np.arange(1_000_000.0))


def test_leftover_of_a_killed_save_is_ignored(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {}, {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).step == 1
        checkpoints.save(2, make_state(value=2.0), {}, {})
        checkpoints.wait()
        assert checkpoints.restore(make_state()).step == 2


def test_other_shape_missing_and_extra_leaves_are_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(width=2), {}, {})
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match=r"params/dense/bias is float32\[2\] in the checkpoint and float32\[4\].*--workdir"
        ):
            checkpoints.restore(make_state(width=4))
        with pytest.raises(ValueError, match="ema/dense/bias is absent in the checkpoint"):
            checkpoints.restore(make_state(ema=True))
        with pytest.raises(ValueError, match=r"params/dense/bias is float32\[2\] in the checkpoint and absent"):
            checkpoints.restore(
                init_state({"dense": {"kernel": jnp.ones((3, 2))}}, make_optimizer(OptimizerConfig(), 10))
            )


@pytest.mark.parametrize("others", [False, True])
def test_damaged_folder_says_what_to_delete(tmp_path, others):
    with Checkpoints(tmp_path) as checkpoints:
        if others:
            checkpoints.save(4, make_state(), {}, {})
        checkpoints.save(5, make_state(), {}, {})
    for path in (tmp_path / "5" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match="delete that folder to " + ("continue from step 4" if others else "start the stage again")
        ):
            checkpoints.restore(make_state())


def test_restores_onto_another_placement(tmp_path):
    """Saved from one device, read on two with the target's sharding."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {}, {})
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place(["data"]))})
    assert found.state["w"].sharding == place(["data"])
    np.testing.assert_array_equal(found.state["w"], np.arange(8.0))
