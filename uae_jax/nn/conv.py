"""Convolutions, channels last, of pictures one by one or interleaved: n pictures as channels `(n, C)` of one.

XLA's CPU backend cuts a convolution over cores along columns alone, and only where a row is enough work, so that one
narrow picture occupies one core (`docs/performance.md`). Interleaved pictures are convolved as columns that take turns,
with the taps of the kernel n columns apart: each picture is seen by itself, without a border between them.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from uae_jax.nn.apart import apart, settle
from uae_jax.nn.constrain import constrain
from uae_jax.nn.device import on_one_cpu

# XLA's CPU backend hands a convolution of up to 16 channels to its fast library only where it makes more than those
# (jax 0.10.2): 16 to 20 channels take 1.3 ms for a picture of 256 x 256, 16 to 16 take 2.3.
NARROW, WIDE = 16, 20

Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nn.Module):
    """A convolution in the precision of the input.

    Attributes:
      features: output channels of a picture.
      kernel_size: side of the square window.
      stride: step in both directions; 1 where pictures are interleaved.
      padding: rows and columns added to a picture: ((top, bottom), (left, right)).
      interleaved: pictures in the channels.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, n in]` to `[B, H', W', n features]`.

        Raises:
          ValueError: interleaved pictures and a stride.
        """
        kernel, bias = _parameters(self, x, self.kernel_size)
        y = _convolve(x, kernel.astype(x.dtype), self.padding, self.interleaved, self.stride)
        return constrain(y + bias, "batch")


class DoublingConv(nn.Module):
    """A 3x3 convolution of a picture that nearest-neighbour enlargement doubles first.

    On a single CPU the enlarged picture is never made: a pixel of the result sees 2x2 pixels of the input, some by the
    sum of several taps, 4 products in place of 9. For a TPU v5e libtpu expects that to take 1.4 to 1.5 times as long,
    since the rows and columns that it computes apart must be moved together and the products are not what takes the
    time there (`docs/performance.md`).

    Attributes:
      features: output channels of a picture.
      interleaved: pictures in the channels.
    """

    features: int
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, n in]` to `[B, 2 H, 2 W, n features]`."""
        kernel, bias = _parameters(self, x, 3)
        form = _double_by_parity if on_one_cpu() else _double_and_convolve
        return constrain(form(x, kernel, self.interleaved) + bias, "batch")


def _double_and_convolve(x: Array, kernel: Array, interleaved: int) -> Array:
    """`[B, H, W, n in]` and `[3, 3, in, out]` to `[B, 2 H, 2 W, n out]`."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels)).reshape(
        batch, 2 * height, 2 * width, channels
    )
    return _convolve(x, kernel.astype(x.dtype), ((1, 1), (1, 1)), interleaved)


def _double_by_parity(x: Array, kernel: Array, interleaved: int) -> Array:
    """The same from the picture itself, rows of even and of odd number by a convolution each."""
    # sums[a][u]: which taps fall on the u-th of the two input rows that a row of parity a sees; columns alike
    sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], jnp.float32)
    kernels = jnp.einsum("aur,bvs,rsif->auvibf", sums, sums, kernel, precision=lax.Precision.HIGHEST).astype(x.dtype)
    even, odd = (
        _convolve(x, kernels[parity].reshape(2, 2, kernel.shape[2], -1), ((1 - parity, parity), (1, 1)), interleaved)
        for parity in (0, 1)
    )
    return apart(_join_parities, even, odd, interleaved=interleaved)


def _parameters(module: Conv | DoublingConv, x: Array, size: int) -> tuple[Array, Array]:
    """Kernel `[size, size, in, features]` in float32, and bias `[n features]` in the precision of the input."""
    shape = (size, size, x.shape[-1] // module.interleaved, module.features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, (module.features,), jnp.float32)
    bias = bias.astype(x.dtype)
    return kernel, bias if module.interleaved == 1 else settle(jnp.tile(bias, module.interleaved))


def _join_parities(even: Array, odd: Array, *, interleaved: int) -> Array:
    """The picture of these rows.

    Args:
      even, odd: rows of even and of odd number, `[B, H, W + 1, n (2 C)]`: even columns of the picture in the first half
        of 2 C, from the first place on, odd ones in the second half, from the second place on.
      interleaved: n.

    Returns:
      `[B, 2 H, 2 W, n C]`.
    """
    batch, height, width = even.shape[:3]
    parts = (rows.reshape(batch, height, width, interleaved, 2, -1) for rows in (even, odd))
    lines = [jnp.stack([y[:, :, :-1, :, 0], y[:, :, 1:, :, 1]], axis=3) for y in parts]
    return jnp.stack(lines, axis=2).reshape(batch, 2 * height, 2 * (width - 1), -1)


def _convolve(x: Array, kernel: Array, padding: Padding, interleaved: int, stride: int = 1) -> Array:
    """`[B, H, W, n in]` and `[h, w, in, out]` to `[B, H', W', n out]`."""
    if interleaved == 1:
        return _product(x, kernel, padding, stride)
    if stride != 1:
        raise ValueError(f"interleaved pictures are convolved in steps of 1, not {stride}")
    return apart(_convolve_interleaved, x, kernel, padding=padding, interleaved=interleaved)


def _convolve_interleaved(x: Array, kernel: Array, *, padding: Padding, interleaved: int) -> Array:
    batch, height, width = x.shape[:3]
    inputs, outputs = kernel.shape[2:]
    x = x.reshape(batch, height, width * interleaved, inputs)
    if inputs <= NARROW:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, max(WIDE - outputs, 0))))
    y = _product(x, kernel, (padding[0], tuple(interleaved * side for side in padding[1])), 1, interleaved)[
        ..., :outputs
    ]
    return y.reshape(*y.shape[:2], -1, interleaved * outputs)


def _product(x: Array, kernel: Array, padding: Padding, stride: int, dilation: int = 1) -> Array:
    """The convolution with taps so many columns apart, `[B, H, W, in]` to `[B, H', W', out]`."""
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, rhs_dilation=(1, dilation), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
