"""Convolutions of pictures one by one and interleaved, and what a single CPU compiles apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from uae_jax.models.sd3.vae import interleave, separate
from uae_jax.nn.conv import Conv, DoublingConv
from uae_jax.nn.device import apart, settle

PICTURES = 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def devices(count):
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return jax.set_mesh(mesh)


def outcome(convolution, params, x, pictures):
    """Result and gradients by parameters and pictures, of pictures that are interleaved by so many."""
    def energy(params, x):
        y = separate(convolution(params, interleave(x, pictures)), pictures)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(energy, argnums=(0, 1), has_aux=True))(params, x)


def check_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels, features", [(16, 16), (5, 3), (24, 20)])
@pytest.mark.parametrize("size", [1, 3])
def test_interleaved_pictures_are_convolved_each_by_itself(channels, features, size):
    padding = ((size // 2, size // 2),) * 2
    params = {"kernel": normal(0, size, size, channels, features), "bias": normal(1, features)}
    x = normal(2, PICTURES, 4, 3, channels)

    def convolution(pictures):
        return lambda params, x: Conv(features, size, padding=padding, interleaved=pictures).apply({"params": params}, x)

    with devices(1):
        alone = outcome(convolution(1), params, x, 1)
        for pictures in (2, PICTURES):
            check_same(outcome(convolution(pictures), params, x, pictures), alone)


@pytest.mark.parametrize("pictures", [1, 2, PICTURES])
@pytest.mark.parametrize("channels, features", [(16, 16), (5, 3)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled_picture(channels, features, pictures):
    params = {"kernel": normal(0, 3, 3, channels, features), "bias": normal(1, features)}
    x = normal(2, PICTURES, 4, 3, channels)

    def enlarged(params, x):
        return Conv(features).apply({"params": params}, jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))

    with devices(1):
        found = outcome(lambda params, x: DoublingConv(features, pictures).apply({"params": params}, x), params, x, pictures)
        check_same(found, outcome(enlarged, params, x, 1))


def test_what_is_apart_stays_a_call_on_one_cpu_and_is_the_function_itself_elsewhere():
    x = jnp.arange(6.0)

    def program(count):
        with devices(count):
            return jax.jit(lambda x: 2.0 * apart(jnp.sin)(x) + settle(jnp.cos(x))).lower(x).compile()

    for count, calls in ((1, 2), (8, 0)):
        compiled = program(count)
        assert compiled.as_text().count('inlineable="false"') >= calls and ("inlineable" in compiled.as_text()) == bool(calls)
        np.testing.assert_allclose(compiled(x), 2 * np.sin(x) + np.cos(x), rtol=1e-6)
