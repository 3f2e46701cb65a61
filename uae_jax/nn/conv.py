"""Convolutions, channels last, of pictures one by one or interleaved: n pictures as channels `(n, C)` of one.

XLA's CPU backend cuts a convolution over cores along columns alone, and only where a row is enough work, so that one narrow picture
occupies one core (`docs/performance.md`). Interleaved pictures are convolved as columns that take turns, with the taps of the kernel n
columns apart: each picture is seen by itself, without a border between them.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from uae_jax.nn.constrain import constrain
from uae_jax.nn.device import apart, settle

# XLA's CPU backend hands a convolution of up to 16 channels to its fast library only where it makes more than those (jax 0.10.2):
# 16 to 20 channels take 1.3 ms for a picture of 256 x 256, 16 to 16 take 2.3.
NARROW, WIDE = 16, 20

Padding = tuple[tuple[int, int], tuple[int, int]]


class Conv(nn.Module):
    """A convolution in the precision of the input.

    Attributes:
      features: output channels of a picture.
      kernel_size: side of the square window.
      stride: step in both directions.
      padding: rows and columns added to a picture: ((top, bottom), (left, right)).
      interleaved: pictures in the channels; with several the stride is 1.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, n in]` to `[B, H', W', n features]`."""
        kernel, bias = _parameters(self, x, self.kernel_size)
        return constrain(convolve(x, kernel, self.padding, self.interleaved, self.stride) + bias, "batch")


class DoublingConv(nn.Module):
    """A 3x3 convolution of a picture that nearest-neighbour enlargement has doubled, without making that picture.

    A pixel of the result sees 2x2 pixels of the input, some by the sum of several taps: 16 products where the enlarged picture takes 36.

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
        # sums[a][u]: which taps fall on the u-th of the two input rows that a row of parity a sees; columns alike
        sums = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)
        kernels = jnp.einsum("aur,bvs,rsif->auvibf", sums, sums, kernel, precision=lax.Precision.HIGHEST)
        rows = [convolve(x, kernels[parity].reshape(2, 2, kernel.shape[2], -1), ((1 - parity, parity), (1, 1)), self.interleaved)
                for parity in (0, 1)]
        return constrain(apart(self._in_turn)(*rows) + bias, "batch")

    def _in_turn(self, *rows: Array) -> Array:
        """Rows of even and of odd number, `[B, H, W + 1, n (2 features)]`; their even columns start at the first, odd ones at the second."""
        batch, height, width = rows[0].shape[:3]
        parts = [y.reshape(batch, height, width, self.interleaved, 2, self.features) for y in rows]
        lines = [jnp.stack([y[:, :, :-1, :, 0], y[:, :, 1:, :, 1]], axis=3) for y in parts]
        return jnp.stack(lines, axis=2).reshape(batch, 2 * height, 2 * (width - 1), -1)


def _parameters(module: Conv | DoublingConv, x: Array, size: int) -> tuple[Array, Array]:
    """Kernel `[size, size, in, features]` and bias `[n features]`, in the precision of the input."""
    shape = (size, size, x.shape[-1] // module.interleaved, module.features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, (module.features,), jnp.float32)
    return kernel.astype(x.dtype), settle(jnp.tile(bias.astype(x.dtype), module.interleaved))


def convolve(x: Array, kernel: Array, padding: Padding, interleaved: int = 1, stride: int = 1) -> Array:
    """The convolution of pictures that may be interleaved.

    Args:
      x: `[B, H, W, n in]`.
      kernel: `[h, w, in, out]`.
      padding: ((top, bottom), (left, right)).
      interleaved: n; above 1 the stride is 1.
      stride: step in both directions.

    Returns:
      `[B, H', W', n out]`.
    """
    if kernel.shape[:2] == (1, 1) and stride == 1 and interleaved == 1:
        return x @ kernel[0, 0]
    if interleaved == 1:
        return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return apart(lambda *given: _convolve_in_turn(*given, padding, interleaved))(x, kernel)


def _convolve_in_turn(x: Array, kernel: Array, padding: Padding, interleaved: int) -> Array:
    batch, height, width = x.shape[:3]
    inputs, outputs = kernel.shape[2:]
    x = x.reshape(batch, height, width * interleaved, inputs)
    if kernel.shape[:2] == (1, 1):
        return (x @ kernel[0, 0]).reshape(batch, height, width, -1)
    if inputs <= NARROW:
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, max(WIDE - outputs, 0))))
    columns = tuple(interleaved * side for side in padding[1])
    y = lax.conv_general_dilated(
        x, kernel, (1, 1), (padding[0], columns), rhs_dilation=(1, interleaved), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y[..., :outputs].reshape(batch, y.shape[1], -1, interleaved * outputs)
