"""Convolutions of pictures one by one and interleaved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import on_devices

from uae_jax.models.sd3.vae import interleave, separate
from uae_jax.nn.conv import Conv, DoublingConv

PICTURES = 4


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    params = {"kernel": 0.1 * normal(0, size, size, channels, features), "bias": normal(1, features)}
    x = normal(2, PICTURES, 4, 3, channels)

    def convolution(pictures):
        return lambda params, x: Conv(features, size, padding=padding, interleaved=pictures).apply(
            {"params": params}, x
        )

    with on_devices(1):
        alone = outcome(convolution(1), params, x, 1)
        for pictures in (2, PICTURES):
            check_same(outcome(convolution(pictures), params, x, pictures), alone)


@pytest.mark.parametrize("pictures", [1, 2, PICTURES])
@pytest.mark.parametrize("channels, features", [(16, 16), (5, 3)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled_picture(channels, features, pictures):
    params = {"kernel": 0.1 * normal(0, 3, 3, channels, features), "bias": normal(1, features)}
    x = normal(2, PICTURES, 4, 3, channels)

    def enlarged(params, x):
        return Conv(features).apply({"params": params}, jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))

    for count in (1, 8):  # both forms
        with on_devices(count):
            found = outcome(
                lambda params, x: DoublingConv(features, pictures).apply({"params": params}, x), params, x, pictures
            )
            check_same(found, outcome(enlarged, params, x, 1))


def test_sums_of_taps_are_rounded_once():
    params, x = (
        {"kernel": normal(0, 3, 3, 16, 16), "bias": np.zeros(16, np.float32)},
        jnp.asarray(normal(2, 1, 8, 8, 16), jnp.bfloat16),
    )

    def doubled(count, x):
        with on_devices(count):
            return np.asarray(jax.jit(lambda x: DoublingConv(16).apply({"params": params}, x).astype(jnp.float32))(x))

    exact = doubled(1, x.astype(jnp.float32))
    summed, enlarged = (np.sqrt(np.mean(np.square(doubled(count, x) - exact))) for count in (1, 8))
    assert 0 < summed < 1.1 * enlarged


def test_interleaved_pictures_take_no_stride():
    with pytest.raises(ValueError, match="steps of 1, not 2"):
        Conv(4, stride=2, interleaved=2).init(jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
