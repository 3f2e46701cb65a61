"""Who takes part in a collective, and what a device receives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding
from uae_jax.planning.chips import parse_topology
from uae_jax.planning.collectives import group_of, members, received, received_by_kind
from uae_jax.planning.hlo import Module
from uae_jax.planning.hlo_text import Array, Instruction
from uae_jax.planning.links import Group, Received, gathered, summed

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]
EVERY_SECOND = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    "written, expected",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("[4,2]<=[8]", PAIRS),
        ("mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("mesh['a'=8] {'a':(4)2}", PAIRS),
        ("{{0,2,4,6},{1,3,5,7}}", EVERY_SECOND),
        ("[2,4]<=[4,2]T(1,0)", EVERY_SECOND),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", EVERY_SECOND),
        ("[1,8]<=[8]", [list(range(8))]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("{}", [list(range(8))]),
    ],
)
def test_groups_are_read_in_every_spelling(written, expected):
    text = f"channel_id=3, replica_groups={written}, use_global_device_ids=true, to_apply=%add"
    np.testing.assert_array_equal(members(text, 8), expected)


def collective(opcode, shape, attributes):
    return Instruction("c", opcode, (Array("bf16", shape),), ("x",), attributes, False)


def test_a_device_receives_what_it_does_not_have():
    topology = parse_topology("v5e:2x4")
    groups = "replica_groups=[2,4]<=[8]"
    whole = 64 * 128 * 2
    assert received(collective("all-gather", (64, 128), groups), topology) == Received(whole * 3 / 4)
    assert received(collective("reduce-scatter", (16, 128), groups), topology) == Received(whole * 3 / 4)
    assert received(collective("all-reduce", (64, 128), groups), topology) == Received(2 * whole * 3 / 4)
    permute = collective("collective-permute", (64, 128), "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}")
    assert received(permute, topology) == Received(whole)


def test_between_slices_a_part_crosses_the_network():
    topology = parse_topology("2xv5e:2x2")
    assert group_of(collective("all-gather", (64, 128), "replica_groups=[1,8]<=[8]"), topology) == Group(8, 2)
    assert group_of(collective("all-gather", (64, 128), "replica_groups=[2,4]<=[8]"), topology) == Group(4, 1)
    over_data = collective("all-reduce", (64, 128), "replica_groups=[4,2]<=[2,4]T(1,0)")
    assert group_of(over_data, topology) == Group(2, 2)
    assert received(over_data, topology) == Received(0.0, 64 * 128 * 2)
    far = collective("collective-permute", (64, 128), "source_target_pairs={{0,4},{4,0}}")
    assert received(far, topology) == Received(0.0, 64 * 128 * 2)


def test_gathers_over_slices_take_each_network_once():
    # eight devices in two slices: each brings an eighth of the other slice's half, and the neighbours pass it on
    assert gathered(800.0, Group(8, 2)) == Received(600.0, 100.0)
    assert gathered(800.0, Group(8)) == Received(700.0)
    assert summed(800.0, Group(2, 2)) == Received(0.0, 800.0)
    topology = parse_topology("2xv5e:2x2")
    assert Received(links=topology.links).seconds(topology) == 1.0
    assert Received(network=2 * topology.chip.network_bandwidth).seconds(topology) == 2.0
    assert Received().seconds(topology) == 0.0


def test_collectives_of_a_compiled_program_are_those_that_it_needs():
    """Weights cut over eight devices are gathered in every pass of a loop; a gradient is summed."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8), jax.devices()[:8])

    def energy(stack, x):
        return jnp.sum(jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, stack)[0])

    def placed(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    arguments = placed((5, 64, 64), None, "fsdp", None), placed((16, 64), "fsdp", None)
    topology = parse_topology("cpu:8")
    forward = Module(jax.jit(energy).lower(*arguments).compile().as_text())
    found = received_by_kind(forward, topology)
    # weights move, or, where that is less, rows
    assert sum(part.links for part in found.values()) >= 5 * min(64 * 64, 16 * 64) * 4 * 7 / 8
    gradient = jax.jit(jax.grad(energy), out_shardings=arguments[0].sharding)
    both = received_by_kind(Module(gradient.lower(*arguments).compile().as_text()), topology)
    assert sum(part.links for part in both.values()) > sum(part.links for part in found.values())
    alone = jax.jit(energy).lower(
        jax.ShapeDtypeStruct((5, 64, 64), jnp.float32), jax.ShapeDtypeStruct((16, 64), "float32")
    )
    assert received_by_kind(Module(alone.compile().as_text()), topology) == {}
