"""Every implementation of attention against the formula, its structure of masks, and how one is picked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from uae_jax.nn.attention import IMPLEMENTATIONS, Mask, SharedKeys, attention, entry, plain, use_attention
from uae_jax.nn.attention.by_head import by_head
from uae_jax.nn.attention.cudnn import arguments, supported
from uae_jax.nn.attention.splash import backward_block, block_size, splash

BATCH, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(length, size, batch=BATCH, width=WIDTH):
    return (
        normal(0, batch, length, HEADS, width),
        normal(1, batch, size, KEY_HEADS, width),
        normal(2, batch, size, KEY_HEADS, width),
    )


def formula(query, key, value, allowed):
    """Loops over rows and heads in float64; `allowed` `[B, T, S]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    expected = np.zeros_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            shared = head // (query.shape[2] // key.shape[2])
            logits = query[row, :, head] @ key[row, :, shared].T / np.sqrt(query.shape[-1])
            weights = np.where(allowed[row], np.exp(logits - logits.max(-1, keepdims=True)), 0)
            expected[row, :, head] = weights / weights.sum(-1, keepdims=True) @ value[row, :, shared]
    return expected


def lengths_mask(size, *lengths):
    return jnp.arange(size) < jnp.asarray(lengths)[:, None]


def allowed_pairs(kind, length, size):
    """Mask and the same as a `[B, T, S]` table written by hand."""
    table = np.ones((BATCH, length, size), bool)
    valid = np.asarray(lengths_mask(size, size, size - 3))
    if kind == "valid":
        return Mask(valid=jnp.asarray(valid), right_padded=True), table & valid[:, None]
    if kind == "causal":
        seen = np.arange(size)[None] <= np.arange(length)[:, None] + size - length
        return Mask(valid=jnp.asarray(valid), causal=True), table & seen & valid[:, None]
    if kind == "groups":
        groups = np.stack([np.arange(length) // 3, np.arange(length) % 4])
        return Mask(groups=jnp.asarray(groups)), groups[:, :, None] == groups[:, None]
    return Mask(), table


CASES = [("all", 5, 7), ("valid", 5, 7), ("causal", 7, 7), ("causal", 4, 9), ("groups", 7, 7)]
FORMS = {
    "plain": plain.plain,
    "by_query_blocks": functools.partial(plain.by_query_blocks, block=3),
    "by_head": functools.partial(by_head, block=3),
    "splash": functools.partial(splash, interpret=True),
}


@pytest.mark.parametrize("kind, length, size", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_formula(form, kind, length, size):
    mask, table = allowed_pairs(kind, length, size)
    found = jax.jit(FORMS[form])(*inputs(length, size), mask)
    np.testing.assert_allclose(found, formula(*inputs(length, size), table), atol=1e-5)


@pytest.mark.parametrize(
    "form, kind", [(form, kind) for form in ("by_query_blocks", "by_head", "splash") for kind in ("causal", "groups")]
)
def test_gradients_equal_those_of_the_plain_form(form, kind):
    mask, _ = allowed_pairs(kind, 7, 7)
    outer = normal(3, BATCH, 7, HEADS, WIDTH)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *x: (attend(*x, mask) * outer).sum(), argnums=(0, 1, 2)))(*inputs(7, 7))

    for found, expected in zip(gradients(FORMS[form]), gradients(plain.plain)):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_splash_over_several_blocks_with_heads_wider_than_a_lane():
    assert [block_size(length) for length in (7, 704, 960, 1568)] == [128, 768, 512, 896]
    assert block_size(4096, 512) == 512  # of the auto-encoder
    assert [backward_block(length) for length in (128, 768, 1024, 1792)] == [128, 384, 512, 256]
    query, key, value = (normal(seed, 1, 960, 2, 136) for seed in range(3))
    mask = Mask(valid=lengths_mask(960, 555), causal=True)
    found = jax.jit(FORMS["splash"])(query, key, value, mask)
    expected = jax.jit(plain.plain)(query, key, value, mask)
    np.testing.assert_allclose(found[:, :555], expected[:, :555], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_ignored_and_rows_without_keys_are_finite(form):
    query, key, value = inputs(6, 6)
    groups = jnp.asarray([[0, 0, 1, 1, -1, -1]] * 2)
    attend = jax.jit(FORMS[form])
    slope = jax.jit(jax.grad(lambda *x: FORMS[form](*x).sum(), argnums=(0, 1, 2)))
    for mask in (
        Mask(valid=lengths_mask(6, 4, 0)),
        Mask(groups=groups),
        Mask(valid=lengths_mask(6, 4, 0), causal=True),
    ):
        found, gradient = attend(query, key, value, mask), slope(query, key, value, mask)
        assert np.isfinite(found).all() and all(np.isfinite(part).all() for part in gradient)
        other = key.copy(), value.copy()
        other[0][:, 4:], other[1][:, 4:] = 9.0, -9.0
        np.testing.assert_array_equal(found[0, :4], attend(query, *other, mask)[0, :4])


@pytest.mark.parametrize("form", ["plain", "by_query_blocks", "by_head", "splash"])
def test_shared_keys_equal_repeated_ones_in_every_form(form, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, form, FORMS[form])
    rows, length = 6, 5  # three rows read each of two entries
    query, key, value = inputs(length, length, batch=rows)
    old_keys, old_values = (jnp.asarray(normal(seed, 2, 3, KEY_HEADS, WIDTH)) for seed in (4, 5))
    stored = SharedKeys(old_keys, old_values, lengths_mask(3, 3, 2))
    own = Mask(valid=lengths_mask(length, 5, 5, 4, 5, 3, 5), causal=True)
    with use_attention(form):
        found = jax.jit(attention)(query, key, value, own, (stored,))
    table = np.concatenate(
        [
            np.broadcast_to(np.repeat(stored.valid, 3, 0)[:, None], (rows, length, 3)),
            np.broadcast_to(own.pairs(length, length), (rows, length, length)),
        ],
        -1,
    )
    joined = [np.concatenate([np.repeat(old, 3, 0), new], 1) for old, new in ((stored.key, key), (stored.value, value))]
    np.testing.assert_allclose(found, formula(query, *joined, table), atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "by_query_blocks", "by_head"])
def test_softmax_is_float32_for_half_precision_inputs(form):
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(4, 4))
    text = str(jax.make_jaxpr(FORMS[form])(query, key, value, Mask()))
    assert " exp " in text and all("f32[" in line for line in text.splitlines() if " = exp " in line)
    assert FORMS[form](query, key, value, Mask()).dtype == jnp.bfloat16


def test_long_sequences_keep_a_block_of_weights_alone():
    length = 1536
    query = jax.ShapeDtypeStruct((1, length, 2, WIDTH), jnp.float32)

    def temporaries(attend):
        gradient = jax.jit(jax.grad(lambda q: attend(q, q, q, Mask(causal=True)).sum()))
        return gradient.lower(query).compile().memory_analysis().temp_size_in_bytes

    whole = 2 * length**2 * 4
    assert temporaries(plain.plain) >= whole
    assert temporaries(functools.partial(by_head, block=128)) < whole / 2
    assert temporaries(functools.partial(plain.by_query_blocks, block=128)) < whole / 2


def test_the_device_and_the_size_choose():
    def queries(length, dtype=jnp.bfloat16, width=64):
        return jax.ShapeDtypeStruct((1, length, 2, width), dtype)

    assert entry.choose("tpu", queries(1), 4096) == entry.choose("gpu", queries(1), 4096) == "plain"
    assert {entry.choose(device, queries(64), 64) for device in ("cpu", "gpu", "tpu")} == {"plain"}
    assert entry.choose("tpu", queries(512), 512) == entry.choose("cpu", queries(512), 512) == "by_query_blocks"
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert entry.choose("tpu", queries(512, jnp.float32), 512) == "splash"
        assert entry.choose("cpu", queries(512), 512) == "by_head"
    assert entry.choose("gpu", queries(512), 512) == "cudnn"
    assert (
        entry.choose("gpu", queries(512, jnp.float32), 512)
        == entry.choose("gpu", queries(512, width=512), 512)
        == "by_query_blocks"
    )
    assert not supported(queries(512, width=20))


def test_the_current_mesh_decides_for_devices_that_are_not_there():
    assert entry.platform() == "cpu"
    chip = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2, abstract_device=chip)
    with jax.sharding.use_abstract_mesh(mesh):
        assert entry.platform() == "tpu"


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="attention is 'flash'; use one of auto, plain"):
        with use_attention("flash"):
            pass
    query, key, value = map(jnp.asarray, inputs(4, 4))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attention(query[:, :, :3], key, value)


@pytest.mark.parametrize("form, sizes", [("splash", (2, 2, 2)), ("by_head", (2, 2, 2)), ("by_head", (2, 1, 4))])
def test_on_a_mesh_each_device_works_on_its_own_rows_and_heads(form, sizes, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, form, FORMS[form])
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    mask = Mask(valid=lengths_mask(6, 6, 3, 5, 6), causal=True)
    arrays = inputs(6, 6, batch=4)
    spread = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    whole_heads = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    placed = jax.device_put(arrays, (spread, *[spread if sizes[2] <= KEY_HEADS else whole_heads] * 2))
    with jax.set_mesh(mesh), use_attention(form):
        step = jax.jit(lambda *x: attention(*x, mask)).lower(*placed).compile()
        found = step(*placed)
    table = np.broadcast_to(mask.pairs(6, 6), (4, 6, 6))
    np.testing.assert_allclose(found, formula(*arrays, table), atol=1e-5)
    assert "all-gather" not in step.as_text() and found.sharding.is_equivalent_to(spread, 4)


def test_cudnn_is_given_lengths_where_padding_is_on_the_right():
    mask = Mask(valid=lengths_mask(6, 4, 0), causal=True, right_padded=True)
    found = arguments(mask, 2, 6, 6)
    assert found["is_causal"] and found["key_value_seq_lengths"].tolist() == [4, 1]
    assert arguments(Mask(causal=True), 2, 6, 6) == {"is_causal": True}
    for mask, length in (
        (Mask(causal=True), 3),
        (Mask(valid=lengths_mask(6, 4, 2)), 6),
        (Mask(groups=jnp.zeros((2, 6), jnp.int32)), 6),
    ):
        found = arguments(mask, 2, length, 6)
        assert list(found) == ["mask"] and found["mask"].shape == (2, 1, length, 6)
