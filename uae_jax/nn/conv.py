"""Convolutions of images, channels last; the layout of the images is that of `nn.images`."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from uae_jax.nn.constrain import constrain
from uae_jax.nn.cpu import convolution as cpu
from uae_jax.nn.cpu.calls import materialised
from uae_jax.nn.cpu.convolution import Padding
from uae_jax.nn.cpu.images import double, interleaved
from uae_jax.nn.device import on_one_cpu
from uae_jax.nn.images import for_every_image, image_channels


class Conv(nn.Module):
    """A convolution in the precision of the input.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: step in both directions.
      padding: rows and columns added to an image: ((top, bottom), (left, right)).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns features"]:
        """Images of C channels to images of `features` channels.

        Raises:
          ValueError: a stride inside `nn.images.over_images` on a single CPU.
        """
        kernel, bias = _parameters(self, x, self.kernel_size)
        return constrain(convolve(x, kernel.astype(x.dtype), self.padding, self.stride) + bias, "batch")


class DoublingConv(nn.Module):
    """A 3x3 convolution of an image that nearest-neighbour enlargement doubles first.

    Attributes:
      features: output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b 2*height 2*width features"]:
        """Images of C channels to images of `features` channels."""
        kernel, bias = _parameters(self, x, 3)
        if on_one_cpu():
            y = cpu.convolve_doubled(x, kernel)
        else:
            y = convolve(double(x), kernel.astype(x.dtype), ((1, 1), (1, 1)))
        return constrain(y + bias, "batch")


def convolve(
    x: Float[Array, "b height width _"],
    kernel: Float[Array, "down across fan_in fan_out"],
    padding: Padding,
    stride: int = 1,
) -> Float[Array, "b rows columns _"]:
    """The convolution of images, without a bias.

    Raises:
      ValueError: interleaved images (`nn.cpu.images`) and a stride.
    """
    if interleaved() > 1:
        if stride != 1:
            raise ValueError(f"interleaved images are convolved in steps of 1, not {stride}")
        return cpu.convolve(x, kernel, padding)
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _parameters(module: Conv | DoublingConv, x: Array, size: int) -> tuple[Array, Array]:
    """Kernel `[size, size, in, features]` in float32, and bias `[features]` in the precision of the input."""
    shape = (size, size, image_channels(x), module.features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, (module.features,), jnp.float32).astype(x.dtype)
    return kernel, bias if interleaved() == 1 else materialised(for_every_image(bias))
