"""Batches of images in the layout of the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import on_devices

from uae_jax.nn.cpu.images import interleave, interleaved, interleaving, separate
from uae_jax.nn.images import for_every_image, image_channels, over_images, to_images, to_tokens

IMAGES = jnp.arange(4 * 2 * 3 * 5.0).reshape(4, 2, 3, 5)


def test_interleaving_and_separating_are_inverses():
    with interleaving(2):
        wide = interleave(IMAGES)
        assert wide.shape == (2, 2, 3, 10) and image_channels(wide) == 5
        np.testing.assert_array_equal(wide[0, ..., :5], IMAGES[0])
        np.testing.assert_array_equal(wide[1, ..., 5:], IMAGES[3])
        np.testing.assert_array_equal(separate(wide), IMAGES)
    np.testing.assert_array_equal(interleave(IMAGES), IMAGES)


@pytest.mark.parametrize("devices, shape", [(1, (1, 2, 3, 20)), (8, (4, 2, 3, 5))])
def test_a_model_over_images_sees_the_layout_of_the_devices_and_returns_the_plain_one(devices, shape):
    seen = []

    def model(x):
        seen.append((x.shape, interleaved()))
        tokens = to_tokens(x)
        assert tokens.shape == (4, 6, 5)
        return x * for_every_image(jnp.arange(5.0)) + to_images(jnp.cumsum(tokens, axis=1), 2, 3)

    with on_devices(devices):
        found = jax.jit(lambda x: over_images(model, x))(IMAGES)
    expected = IMAGES * jnp.arange(5.0) + jnp.cumsum(IMAGES.reshape(4, 6, 5), axis=1).reshape(IMAGES.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert seen == [(shape, shape[-1] // 5)] and interleaved() == 1
