"""Norms, rotation and adapted linear maps against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from uae_jax import trees
from uae_jax.nn.linear import Dense, adapted
from uae_jax.nn.lora import init_lora, merge_adapter
from uae_jax.nn.norms import GroupNorm, LayerNorm, RMSNorm
from uae_jax.nn.rope import apply_rope


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_norms_against_numpy():
    x = normal(0, 2, 3, 4, 8) * 3 + 1
    found = RMSNorm(1e-6).apply({"params": {"scale": jnp.full(8, 2.0)}}, x)
    np.testing.assert_allclose(found, 2 * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)
    found = LayerNorm(1e-5, affine=False).apply({}, x)
    np.testing.assert_allclose(
        found, (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5), atol=1e-5
    )
    found = GroupNorm(2).apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    groups = x.reshape(2, 3, 4, 2, 4)
    mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    np.testing.assert_allclose(found, ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape), atol=1e-5)


def test_statistics_are_float32_for_half_precision_inputs():
    x = (normal(0, 1, 4096) + 100).astype(jnp.bfloat16)  # in bfloat16 the mean of squares would lose the spread
    exact = np.asarray(x, np.float64)
    found = np.asarray(LayerNorm(affine=False).apply({}, x), np.float64)
    np.testing.assert_allclose(found, (exact - exact.mean()) / exact.std(), atol=0.02)


def test_rotation_keeps_lengths_and_sees_only_distances():
    x, y = normal(0, 6, 1, 8), normal(1, 6, 1, 8)
    frequencies = 1.0 / 100 ** (np.arange(4) / 4)

    def scores(start):
        angles = jnp.asarray((start + np.arange(6))[:, None] * frequencies)
        turned = [np.asarray(apply_rope(z, angles))[:, 0] for z in (x, y)]
        np.testing.assert_allclose(np.linalg.norm(turned[0], axis=-1), np.linalg.norm(x[:, 0], axis=-1), rtol=1e-5)
        return turned[0] @ turned[1].T

    np.testing.assert_allclose(scores(0.0), scores(11.0), atol=1e-4)
    assert np.abs(scores(0.0) - x[:, 0] @ y[:, 0].T).max() > 0.1


@pytest.fixture
def layers():
    """Kernels of two stacked maps and one alone, with a new adapter of the first."""
    base = {
        "layers": {"up": {"kernel": np.asarray(normal(0, 2, 6, 5))}},
        "head": {"kernel": np.asarray(normal(1, 5, 3))},
    }
    return base, init_lora(jax.random.key(0), base, r"layers/.*", 2)


def test_new_adapters_change_nothing_and_trained_ones_equal_the_merged_kernel(layers):
    base, adapter = layers
    assert adapter["layers"]["up"]["a"].shape == (2, 6, 2) and adapter["layers"]["up"]["b"].shape == (2, 2, 5)
    x, dense = normal(3, 4, 6), Dense(5, use_bias=False, lora_alpha=8.0)

    def apply(kernels, lora, layer):
        variables = {"params": {"kernel": jnp.asarray(kernels["layers"]["up"]["kernel"][layer])}}
        return dense.apply(
            variables | ({"lora": jax.tree.map(lambda z: z[layer], lora["layers"]["up"])} if lora else {}), x
        )

    np.testing.assert_array_equal(apply(base, adapter, 1), apply(base, None, 1))
    trained = jax.tree.map(lambda leaf: leaf + 0.3, adapter)
    merged = merge_adapter(base, trained, 8.0)
    assert np.abs(apply(base, trained, 1) - apply(base, None, 1)).max() > 0.1
    np.testing.assert_allclose(apply(base, trained, 1), apply(merged, None, 1), atol=1e-4)
    np.testing.assert_array_equal(merged["head"]["kernel"], base["head"]["kernel"])


@pytest.mark.parametrize("tokens, merged", [((2,), False), ((2, 1), False), ((3,), True), ((2, 40), True)])
def test_both_orders_of_the_adapters_products_have_the_same_value_and_gradients(tokens, merged):
    """6 x 5 kernels: from three tokens on, the sum of kernels is less work; its backward pass never differentiates that
    sum.
    """
    arguments = normal(3, *tokens, 6), normal(4, 6, 5), normal(5, 6, 2), normal(6, 2, 5)
    assert ("custom_vjp_call" in str(jax.make_jaxpr(lambda *x: adapted(*x, 0.5))(*arguments))) == merged
    weight = normal(7, *tokens, 5)

    def formula(x, kernel, a, b):
        return x @ kernel + 0.5 * (x @ a @ b)

    def outcome(function):
        whole = jax.value_and_grad(lambda *x: jnp.sum(weight * function(*x)), argnums=(0, 1, 2, 3))(*arguments)
        adapter = jax.grad(lambda a, b: jnp.sum(weight * function(*arguments[:2], a, b)), argnums=(0, 1))(
            *arguments[2:]
        )
        return whole, adapter

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4, rtol=1e-5),
        outcome(lambda *x: adapted(*x, 0.5)),
        outcome(formula),
    )


def test_matrix_units_that_round_their_operands_see_the_adapter_apart():
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    arguments = normal(0, 300, 6), normal(1, 6, 5), normal(2, 6, 2), normal(3, 2, 5)
    assert "custom_vjp_call" in str(jax.make_jaxpr(lambda *x: adapted(*x, 0.5))(*arguments))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=chip)):
        assert "custom_vjp_call" not in str(jax.make_jaxpr(lambda *x: adapted(*x, 0.5))(*arguments))


def test_half_precision_keeps_an_adapter_that_is_small_beside_its_kernel():
    x, kernel, a, b = (
        jnp.asarray(z, jnp.bfloat16)
        for z in (jnp.ones((300, 6)), jnp.ones((6, 5)), jnp.full((6, 2), 0.01), jnp.full((2, 5), 0.01))
    )
    lone = adapted(x, jnp.zeros_like(kernel), a, b, 1.0)
    assert (lone > 0).all() and (kernel + a @ b == kernel).all()
    np.testing.assert_array_equal(adapted(x, kernel, a, b, 1.0), x @ kernel + lone)


def test_adapters_depend_on_names_and_must_match_something(layers):
    base, adapter = layers
    alone = init_lora(jax.random.key(0), {**base, "other": base["head"]}, r"layers/.*", 2)
    jax.tree.map(np.testing.assert_array_equal, adapter, alone)
    with pytest.raises(ValueError, match="no linear layer matches the adapter pattern 'blocks/"):
        init_lora(jax.random.key(0), base, r"blocks/.*", 2)
    with pytest.raises(KeyError):
        merge_adapter(base, {"absent": {"a": normal(0, 2, 1), "b": normal(0, 1, 2)}}, 1.0)


def test_names_and_trees_are_inverses():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert trees.flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3} and trees.unflatten(trees.flatten(tree)) == tree


def test_group_norm_of_values_far_from_zero():
    x = np.random.default_rng(0).standard_normal((1, 64, 64, 4)) + 30.0
    found = GroupNorm(2).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, jnp.asarray(x, jnp.float32))
    grouped = x.reshape(1, 64, 64, 2, 2)
    wanted = (grouped - grouped.mean((1, 2, 4), keepdims=True)) / grouped.std((1, 2, 4), keepdims=True)
    np.testing.assert_allclose(found, wanted.reshape(x.shape), atol=1e-4)


def test_group_norm_of_a_constant_picture_is_its_bias():
    found = GroupNorm(1).apply(
        {"params": {"scale": jnp.ones(2), "bias": jnp.array([1.0, 2.0])}}, jnp.full((1, 9, 9, 2), 7.3)
    )
    np.testing.assert_allclose(found, np.broadcast_to([1.0, 2.0], (1, 9, 9, 2)), atol=1e-2)
