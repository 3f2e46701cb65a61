"""Kernels of 8 bits: the error of a weight is bounded, and an adapter adds to them as to the model's own."""

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.nn import int8
from uae_jax.nn.linear import Dense


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_every_weight_is_within_half_a_step():
    kernel = normal(0, 3, 16, 8) * jnp.exp(normal(1, 3, 1, 8))
    kernel = kernel.at[1, :, 2].set(0.0)  # an output that is zero
    values, scale = int8.quantised_kernel(kernel)
    assert values.dtype == jnp.int8 and scale.shape == (3, 8) and scale[1, 2] == 0
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scale)[:, None] - kernel)
    assert (error <= np.asarray(scale)[:, None] * 0.5 + 1e-7).all() and np.abs(values).max() == 127


def test_kernels_alone_are_rounded_and_scales_have_their_paths():
    tree = {"a": {"kernel": normal(0, 4, 3), "bias": normal(1, 3)}, "norm": {"scale": normal(2, 4)}}
    values, scales = int8.quantised(tree)
    assert values["a"]["kernel"].dtype == jnp.int8 and values["a"]["bias"] is tree["a"]["bias"]
    assert values["norm"]["scale"] is tree["norm"]["scale"]
    assert jax.tree.structure(scales) == jax.tree.structure({"a": {"kernel": 0}})


def test_a_dense_layer_reads_them_with_and_without_an_adapter():
    x, dense = normal(0, 5, 64), Dense(32)
    params = dense.init(jax.random.key(0), x)["params"]
    values, scales = int8.quantised(params)
    exact = dense.apply({"params": params}, x)
    rounded = dense.apply({"params": values, int8.SCALES: scales}, x)
    whole = {"params": params | {"kernel": values["kernel"] * scales["kernel"]}}
    np.testing.assert_allclose(rounded, dense.apply(whole, x), atol=1e-4)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
    adapter = {"a": normal(2, 64, 2), "b": normal(3, 2, 32)}
    moved = dense.apply({"params": params, "lora": adapter}, x) - exact
    also = dense.apply({"params": values, int8.SCALES: scales, "lora": adapter}, x) - rounded
    assert np.abs(moved).max() > 0.1
    np.testing.assert_allclose(also, moved, atol=1e-3)
