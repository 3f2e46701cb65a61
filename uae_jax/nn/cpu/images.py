"""Images of a batch interleaved as channels, the layout in which XLA's CPU backend convolves several images at once.

The backend shards a convolution over cores along columns alone, and only where a row is enough work. One narrow image
then occupies one core (`dev/performance.md`). Inside `interleaving(n)` arrays of images are `[B / n, H, W, n C]`: the
channels of n neighbouring images lie side by side.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Float

_images: contextvars.ContextVar[int] = contextvars.ContextVar("interleaved images", default=1)


@contextlib.contextmanager
def interleaving(images: int) -> Iterator[None]:
    """Everything traced inside has so many images in the channels of one array row."""
    token = _images.set(images)
    try:
        yield
    finally:
        _images.reset(token)


def interleaved() -> int:
    """The number of images in the channels; 1 outside of `interleaving`."""
    return _images.get()


def interleave(x: Float[Array, "b height width c"]) -> Float[Array, "_ height width _"]:
    """Neighbouring images as channels of one: `[B, H, W, C]` to `[B / n, H, W, n C]`."""
    images = interleaved()
    if images == 1:
        return x
    _, height, width, channels = x.shape
    grouped = x.reshape(-1, images, height, width, channels).transpose(0, 2, 3, 1, 4)
    return grouped.reshape(-1, height, width, images * channels)


def separate(x: Float[Array, "_ height width _"]) -> Float[Array, "b height width c"]:
    """The inverse of `interleave`: `[B / n, H, W, n C]` to `[B, H, W, C]`."""
    images = interleaved()
    if images == 1:
        return x
    batch, height, width, channels = x.shape
    grouped = x.reshape(batch, height, width, images, -1).transpose(0, 3, 1, 2, 4)
    return grouped.reshape(-1, height, width, channels // images)


def double(x: Float[Array, "b height width c"]) -> Float[Array, "b 2*height 2*width c"]:
    """Every pixel twice in both directions."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
