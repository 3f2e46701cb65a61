"""Joint attention of token streams: the kernels for heads side by side against the formula, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from uae_jax.models.sd3.blocks import Block
from uae_jax.models.sd3.config import TransformerConfig
from uae_jax.nn.attention import Mask, Stream, joint_attention, lanes, use_attention

BATCH, HEADS, WIDTH, LENGTHS = 4, 4, 64, (48, 32)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stream(seed, length, width=WIDTH, scales=True):
    query, key, value = (normal(3 * seed + part, BATCH, length, HEADS, width) for part in range(3))
    norms = (1 + 0.1 * normal(90 + seed, width), 1 + 0.1 * normal(80 + seed, width)) if scales else (None, None)
    return Stream(query, key, value, *norms)


def mask():
    """The last stream has 32, 5, 31 and 1 tokens."""
    valid = jnp.arange(sum(LENGTHS)) < 48 + jnp.asarray([32, 5, 31, 1])[:, None]
    return Mask(valid=valid, right_padded=True, always=48)


def both_forms(streams, mask):
    """Results, and gradients of a weighted sum, of the joined formula and of the kernels."""
    outer = [None if one.query is None else normal(70 + at, *one.query.shape) for at, one in enumerate(streams)]

    def values_and_slopes(form):
        def total(streams):
            with use_attention(form):
                mixed = joint_attention(streams, mask)
            return sum(jnp.sum(x * y) for x, y in zip(mixed, outer) if x is not None), mixed

        slopes, mixed = jax.jit(jax.grad(total, has_aux=True))(streams)
        return jax.tree.leaves((mixed, slopes))

    return values_and_slopes("plain"), values_and_slopes("splash")


CASES = {
    "two streams": lambda: ([stream(0, 48), stream(1, 32)], mask()),
    "one that is only read": lambda: ([stream(0, 48), stream(1, 32)._replace(query=None, query_scale=None)], mask()),
    "without norms and padding": lambda: ([stream(0, 32, scales=False), stream(1, 16, scales=False)], Mask()),
    "one stream of wide heads": lambda: ([stream(0, 32, width=128)], Mask()),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_side_by_side_are_the_formula_with_its_gradients(case):
    expected, found = both_forms(*CASES[case]())
    assert len(expected) == len(found)
    for one, other in zip(expected, found):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(other, one, atol=3e-5 * max(1.0, float(np.abs(one).max())))


def test_several_blocks_of_queries_add_up(monkeypatch):
    monkeypatch.setattr(lanes, "WEIGHTS", 16 * 80)
    assert lanes.query_block(48, 80) == 16
    for one, other in zip(*both_forms([stream(0, 48), stream(1, 32)], mask())):
        np.testing.assert_allclose(other, one, atol=3e-5 * max(1.0, float(np.abs(one).max())))


def test_padding_has_no_effect():
    streams = [stream(0, 48), stream(1, 32)]
    changed = streams[1]._replace(key=streams[1].key.at[1, 5:].set(9.0), value=streams[1].value.at[1, 5:].set(-9.0))
    with use_attention("splash"):
        found, again = (jax.jit(joint_attention)(given, mask()) for given in (streams, [streams[0], changed]))
    np.testing.assert_array_equal(found[0], again[0])


def test_blocks_of_queries_divide_the_length_and_fit_the_chip():
    assert (lanes.query_block(1024, 1568), lanes.query_block(544, 1568), lanes.query_block(900, 1444)) == (256, 272, 0)
    assert lanes.supported((1024, 544), 24, 64) and lanes.supported((1024, 544), 38, 64)
    assert not lanes.supported((1024, 531), 24, 64) and not lanes.supported((1024,), 16, 80)
    assert not lanes.supported((1024,), 19, 64)  # half of the heads of the large model
    assert not lanes.supported((4096, 544), 24, 64)  # images of 1024 x 1024 pixels


def test_each_device_works_on_its_own_rows_and_heads():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    streams, given = [stream(0, 48), stream(1, 32)], mask()
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.device_put(x, place if x.ndim == 4 else whole), streams)
    with use_attention("plain"):
        expected = jax.jit(joint_attention)(streams, given)
    with jax.set_mesh(mesh), use_attention("splash"):
        step = jax.jit(lambda streams: joint_attention(streams, given)).lower(placed).compile()
        found = step(placed)
    assert "all-gather" not in step.as_text()
    for one, other in zip(expected, found):
        np.testing.assert_allclose(other, one, atol=2e-5)
        assert other.sharding.is_equivalent_to(place, 4)


def tpu_mesh():
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return AbstractMesh((4, 1), ("data", "tensor"), (AxisType.Auto,) * 2, abstract_device=chip)


def operations(jaxpr):
    """Names of all operations with the number of axes of their results, without those inside of kernels."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, max((out.aval.ndim for out in equation.outvars), default=0)
        if equation.primitive.name != "pallas_call":
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


@pytest.mark.parametrize("dual", [False, True])
def test_a_block_on_a_tpu_moves_no_heads_and_joins_no_streams(dual):
    config = TransformerConfig(
        num_layers=2, num_attention_heads=2, dual_attention_layers=(), qk_norm="rms_norm", dtype="bfloat16"
    )
    x, context = (jax.ShapeDtypeStruct((4, length, config.width), jnp.bfloat16) for length in (256, 32))
    conditioning = jax.ShapeDtypeStruct((4, config.width), jnp.bfloat16)
    block, padding = Block(config, dual=dual), Mask(jnp.ones((4, 288), bool), right_padded=True, always=256)
    params = jax.eval_shape(block.init, jax.random.key(0), (x, context), conditioning, padding)

    def run(params, x, context, conditioning):
        return block.apply(params, (x, context), conditioning, padding)

    with jax.sharding.use_abstract_mesh(tpu_mesh()):
        found = list(operations(jax.make_jaxpr(run)(params, x, context, conditioning).jaxpr))
    kernels = [name for name, _ in found if name == "pallas_call"]
    assert len(kernels) == 2 + dual  # image and context queries, and the second attention
    assert not [name for name, axes in found if axes >= 3 and name in ("transpose", "concatenate", "pad")]
