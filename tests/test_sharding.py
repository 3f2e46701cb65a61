"""Where parameters and batches lie on a mesh, by rule and by what each device holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from uae_jax import sharding
from uae_jax.sharding import MeshConfig, make_mesh, parameter_spec


def mesh(data=2, fsdp=2, tensor=2):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:8])


def test_one_axis_may_take_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig(-1, 2, 2), jax.devices()[:8]).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes, message", [
    ((3, 1, 1), "does not divide 8 devices"), ((2, 2, 1), "needs 4 devices, there are 8"), ((-1, -1, 1), "at most one may be -1"),
    ((0, 1, 1), "must be positive"), ((-2, 1, 1), "must be positive")])
def test_meshes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        mesh(*sizes)


@pytest.mark.parametrize("name, shape, expected", [
    # first matrix of a pair along its output, second along its input, fsdp on what is left
    ("language/layers/attention/query/kernel", (4, 256, 512), (None, "fsdp", "tensor")),
    ("language/layers/mlp/down/kernel", (4, 512, 256), (None, "tensor", "fsdp")),
    ("transformer/blocks_0/attention/context_output/kernel", (2, 256, 256), (None, "tensor", "fsdp")),
    ("language/embedding/table", (1024, 256), ("fsdp", None)),
    # a tensor axis that does not divide is left alone, and so is what is small
    ("language/layers/attention/key/kernel", (4, 512, 255), (None, "fsdp", None)),
    ("language/layers/attention/query/kernel", (4, 32, 32), ()),
    ("language/norm/scale", (2048,), ())])
def test_parameters_lie_by_role_and_size(name, shape, expected):
    assert parameter_spec(name, shape, mesh()) == PartitionSpec(*expected)


def test_optimizer_slots_lie_as_their_parameters():
    name, shape = "language/layers/mlp/up/kernel", (4, 256, 512)
    assert parameter_spec(f"0/mu/{name}", shape, mesh()) == parameter_spec(name, shape, mesh())


def test_a_mesh_of_data_alone_copies_all_parameters():
    assert parameter_spec("language/layers/mlp/up/kernel", (4, 256, 512), mesh(8, 1, 1)) == PartitionSpec(None, None, None)


def test_every_device_holds_its_share():
    tree = {"up": {"kernel": jnp.arange(512 * 256, dtype=jnp.float32).reshape(512, 256)}, "bias": jnp.zeros(3)}
    placed = sharding.shard_tree({"mlp": tree}, mesh())["mlp"]
    assert {shard.data.shape for shard in placed["up"]["kernel"].addressable_shards} == {(256, 128)}
    assert {shard.data.shape for shard in placed["bias"].addressable_shards} == {(3,)}
    np.testing.assert_array_equal(placed["up"]["kernel"], tree["up"]["kernel"])


def test_batches_are_cut_over_data_and_fsdp():
    rows = np.arange(8, dtype=np.int32)
    placed = sharding.shard_batch({"sample_id": rows}, mesh())["sample_id"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(placed, rows)
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4 devices"):
        sharding.shard_batch({"sample_id": rows[:6]}, mesh())
