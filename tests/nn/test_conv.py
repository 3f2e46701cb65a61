"""Convolutions of images one by one and interleaved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import on_devices

from uae_jax.nn.conv import Conv, DoublingConv
from uae_jax.nn.cpu.images import interleave, interleaving, separate

IMAGES = 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def applied(module):
    return lambda params, x: module.apply({"params": params}, x)


def outcome(convolution, params, x, images=1):
    """Result and gradients by parameters and images, so many of which are interleaved."""

    def energy(params, x):
        with interleaving(images):
            y = separate(convolution(params, interleave(x)))
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(energy, argnums=(0, 1), has_aux=True))(params, x)


def check_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels, features", [(16, 16), (5, 3), (24, 20)])
@pytest.mark.parametrize("size", [1, 3])
def test_interleaved_pictures_are_convolved_each_by_itself(channels, features, size):
    padding = ((size // 2, size // 2),) * 2
    params = {"kernel": 0.1 * normal(0, size, size, channels, features), "bias": normal(1, features)}
    x, convolution = normal(2, IMAGES, 4, 3, channels), applied(Conv(features, size, padding=padding))
    with on_devices(1):
        alone = outcome(convolution, params, x)
        for images in (2, IMAGES):
            check_same(outcome(convolution, params, x, images), alone)


@pytest.mark.parametrize("devices, images", [(1, 1), (1, 2), (1, IMAGES), (8, 1)])
@pytest.mark.parametrize("channels, features", [(16, 16), (5, 3)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled_picture(channels, features, devices, images):
    params = {"kernel": 0.1 * normal(0, 3, 3, channels, features), "bias": normal(1, features)}
    x = normal(2, IMAGES, 4, 3, channels)

    def enlarged(params, x):
        return Conv(features).apply({"params": params}, jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))

    with on_devices(devices):
        check_same(outcome(applied(DoublingConv(features)), params, x, images), outcome(enlarged, params, x))


def test_sums_of_taps_are_rounded_once():
    params, x = (
        {"kernel": jnp.asarray(normal(0, 3, 3, 16, 16)), "bias": jnp.zeros(16)},
        jnp.asarray(normal(2, 1, 8, 8, 16), jnp.bfloat16),
    )

    def doubled(count, x):
        with on_devices(count):
            return np.asarray(jax.jit(lambda x: DoublingConv(16).apply({"params": params}, x).astype(jnp.float32))(x))

    exact = doubled(1, x.astype(jnp.float32))
    summed, enlarged = (np.sqrt(np.mean(np.square(doubled(count, x) - exact))) for count in (1, 8))
    assert 0 < summed < 1.1 * enlarged


def test_interleaved_pictures_take_no_stride():
    with interleaving(2), pytest.raises(ValueError, match="steps of 1, not 2"):
        Conv(4, stride=2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
