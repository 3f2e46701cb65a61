"""Convolutions of interleaved images (`nn.cpu.images`), and of images that are doubled first.

The columns of interleaved images take turns, and the taps of the kernel are n columns apart. A tap then never meets
another image, and no border between images is needed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from uae_jax.nn.cpu.calls import separately
from uae_jax.nn.cpu.images import double, interleave, interleaved, interleaving, separate

# XLA's CPU backend hands a convolution of up to 16 channels to its fast library only where it makes more than those
# (jax 0.10.2): 16 to 20 channels take 1.3 ms for an image of 256 x 256, 16 to 16 take 2.3.
NARROW, WIDE = 16, 20

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Float[Array, "b height width _"], kernel: Float[Array, "down across fan_in fan_out"], padding: Padding
) -> Float[Array, "b rows columns _"]:
    """The convolution in steps of 1, of `[B, H, W, n C]` for n interleaved images."""
    if interleaved() == 1:
        return _product(x, kernel, padding, 1)
    together = functools.partial(separately, _convolve_interleaved, padding=padding, images=interleaved())
    return _differentiated_apart(together, interleaved(), lambda x, k: _product(x, k, padding, 1))(x, kernel)


def _differentiated_apart(
    function: Callable[..., Array], images: int, plain: Callable[..., Array]
) -> Callable[..., Array]:
    """`function(x, kernel)` of interleaved images, with the gradients of `plain`, which is the same of images apart.

    Taps that are n columns apart have no fast library behind their gradients. Those of a decoder of 32-pixel images, 16
    at a time, take 1.9 s on one core; those of images apart take .1 s.
    """
    differentiable = jax.custom_vjp(function)

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        with interleaving(images):
            _, gradients = jax.vjp(plain, separate(saved[0]), saved[1])
            by_images, by_kernel = gradients(separate(gradient))
            return interleave(by_images), by_kernel

    differentiable.defvjp(lambda x, kernel: (function(x, kernel), (x, kernel)), backward)
    return differentiable


def convolve_doubled(
    x: Float[Array, "b height width _"], kernel: Float[Array, "3 3 fan_in fan_out"]
) -> Float[Array, "b 2*height 2*width _"]:
    """A 3x3 convolution of the image that nearest-neighbour enlargement doubles, without making the enlarged image.

    A pixel of the result sees 2x2 pixels of the input, some by the sum of several taps: 4 products in place of 9. Rows
    of even and of odd number are a convolution each. libtpu expects this form to take 1.4 to 1.5 times as long on a TPU
    v5e, where moving rows and columns together costs more than the products (`dev/performance.md`).

    Args:
      x: `[B, H, W, n C]` of n interleaved images.
      kernel: in float32.
    """
    return _differentiated_apart(_convolve_doubled, interleaved(), _convolve_repeated)(x, kernel)


def _convolve_repeated(x: Array, kernel: Array) -> Array:
    """`convolve_doubled` of images apart, by the enlarged images."""
    return _product(double(x), kernel.astype(x.dtype), ((1, 1), (1, 1)), 1)


def _convolve_doubled(x: Array, kernel: Array) -> Array:
    # sums[a][u]: which taps fall on the u-th of the two input rows that a row of parity a sees; columns alike
    sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    kernels = jnp.einsum("aur,bvs,rsif->auvibf", sums, sums, kernel, precision=lax.Precision.HIGHEST).astype(x.dtype)
    even, odd = (
        convolve(x, kernels[parity].reshape(2, 2, kernel.shape[2], -1), ((1 - parity, parity), (1, 1)))
        for parity in (0, 1)
    )
    return separately(_join_parities, even, odd, images=interleaved())


def _join_parities(even: Array, odd: Array, *, images: int) -> Array:
    """The image of these rows.

    Args:
      even, odd: rows of even and of odd number, `[B, H, W + 1, n (2 C)]`. The first half of 2 C has the even columns of
        the image, from the first column on; the second half has the odd ones, from the second column on.
      images: n.

    Returns:
      `[B, 2 H, 2 W, n C]`.
    """
    batch, height, width = even.shape[:3]
    parts = (rows.reshape(batch, height, width, images, 2, -1) for rows in (even, odd))
    lines = [jnp.stack([y[:, :, :-1, :, 0], y[:, :, 1:, :, 1]], axis=3) for y in parts]
    return jnp.stack(lines, axis=2).reshape(batch, 2 * height, 2 * (width - 1), -1)


def _convolve_interleaved(x: Array, kernel: Array, *, padding: Padding, images: int) -> Array:
    batch, height, width = x.shape[:3]
    inputs, outputs = kernel.shape[2:]
    x = x.reshape(batch, height, width * images, inputs)
    if inputs <= NARROW:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, max(WIDE - outputs, 0))))
    rows, (left, right) = padding
    y = _product(x, kernel, (rows, (images * left, images * right)), images)[..., :outputs]
    return y.reshape(*y.shape[:2], -1, images * outputs)


def _product(x: Array, kernel: Array, padding: Padding, dilation: int) -> Array:
    """The convolution with taps so many columns apart, `[B, H, W, in]` to `[B, H', W', out]`."""
    if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(
        x, kernel, (1, 1), padding, rhs_dilation=(1, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
