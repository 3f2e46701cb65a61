"""Checkpoints: round trip, leftovers of a kill, messages for folders that do not fit, and damaged ones."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uae_jax.training.checkpoint import Checkpoints, Damaged
from uae_jax.training.checksums import array_checksums
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


def saved(folder, *steps):
    """Checkpoints whose numbers are their step."""
    with Checkpoints(folder, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(value=float(step)), {"next_index": step}, {"seconds": step / 10})
            checkpoints.wait()


@pytest.mark.parametrize("others", [False, True])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_read(tmp_path, capsys, others):
    saved(tmp_path, *((4, 5) if others else (5,)))
    for path in (tmp_path / "5" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Damaged, match="5 cannot be read .*; delete .* to train the stage again"):
            checkpoints.restore(make_state(), 5)
        found = checkpoints.restore(make_state())
        assert (found and found.step) == (4 if others else None)
        checkpoints.save(5, make_state(value=5.0), {}, {})
        checkpoints.wait()
        assert checkpoints.restore(make_state()).step == 5
    said = capsys.readouterr().err
    assert "5 cannot be read" in said and f"it is now {tmp_path / 'damaged_5'}" in said
    assert ("the stage continues from step 4" if others else "the stage begins again") in said


def test_a_bit_that_flips_is_never_read_as_another_number(tmp_path):
    """Positions over all files of a checkpoint, compressed arrays and JSON alike."""
    saved(tmp_path / "whole", 1)
    rng = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "whole" / "1").rglob("*") if path.is_file() and path.stat().st_size)
    outcomes = []
    for number in range(24):
        path = files[number % len(files)]
        folder = tmp_path / f"flipped_{number}"
        shutil.copytree(tmp_path / "whole", folder)
        data = bytearray(path.read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (folder / path.relative_to(tmp_path / "whole")).write_bytes(data)
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(make_state())
        outcomes.append(found is None)
        if found is not None:  # the byte says nothing, such as the time of the save
            jax.tree.map(np.testing.assert_array_equal, found.state, make_state(value=1.0))
            assert (found.data, found.meta) == ({"next_index": 1}, {"seconds": 0.1})
        shutil.rmtree(folder)
    assert any(outcomes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float16"])
def test_every_changed_word_changes_the_checksum(dtype):
    values = jnp.arange(2 * 3 * 5).reshape(2, 3, 5).astype(dtype)
    known = array_checksums({"w": values})
    assert array_checksums({"w": np.asarray(values)}) == known
    for place in np.ndindex(2, 3, 5):
        other = jnp.asarray(0 if values[place] else 1, dtype)
        assert array_checksums({"w": values.at[place].set(other)}) != known
    if dtype != "bool":
        assert array_checksums({"w": values[::-1]}) != known
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert array_checksums({"w": jax.device_put(values, place)}) == known
    assert array_checksums({}) == {} and array_checksums({"count": jnp.int32(7)}) == {"count": 7}


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path):
    saved(tmp_path, 3)
    shutil.rmtree(tmp_path / "3" / "checksums")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.meta() == {"seconds": 0.3}
        assert checkpoints.restore(make_state()).step == 3


def test_a_rename_that_stopped_half_way_leaves_the_step_before(tmp_path):
    """A mounted bucket copies a folder file by file; the commit file is among the last."""
    saved(tmp_path, 2, 4)
    (tmp_path / "4").rename(tmp_path / "4.orbax-checkpoint-tmp")
    half = sorted(path for path in (tmp_path / "4.orbax-checkpoint-tmp").rglob("*") if path.is_file())[::2]
    for path in half:
        if path.name != "commit_success.txt":
            copy = tmp_path / "4" / path.relative_to(tmp_path / "4.orbax-checkpoint-tmp")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    with Checkpoints(tmp_path, clean=False) as checkpoints:
        assert checkpoints.latest_step() == 2 and checkpoints.meta() == {"seconds": 0.2}
    assert (tmp_path / "4").is_dir()  # a look deletes nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(make_state()).step == 2
        checkpoints.save(4, make_state(value=4.0), {}, {})
        checkpoints.wait()
        assert checkpoints.restore(make_state()).step == 4


def test_restores_onto_another_placement(tmp_path):
    """Saved from one device, read on two with the target's sharding."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    place = lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(8.0)}, {}, {})
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=place(["data"]))})
    assert found.state["w"].sharding == place(["data"])
    np.testing.assert_array_equal(found.state["w"], np.arange(8.0))
