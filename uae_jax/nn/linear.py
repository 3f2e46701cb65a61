"""Affine maps with optional low-rank adapters."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from uae_jax.nn.constrain import constrain

# XLA's CPU backend hands a convolution of up to 16 channels to its fast library only where it makes more than those (jax 0.10.2):
# with 20, of which the last are zero and cut off, 16 to 16 channels of interleaved pictures take 1.3 ms in place of 2.3
NARROW, WIDE = 16, 20


class Dense(nn.Module):
    """`x @ kernel + bias`, plus `alpha / rank * x @ a @ b` where an adapter is given (LoRA, arXiv 2106.09685, eq. 3).

    The adapter lives in the variable collection `lora` under the module's own path: applying a model without that
    collection is the reference model. The computation has the precision of the input.

    Attributes:
      features: output width.
      use_bias: whether a bias is added.
      lora_alpha: numerator of the adapter's scale; the rank is read from the adapter.
    """

    features: int
    use_bias: bool = True
    lora_alpha: float = 64.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., in]` to `[..., features]`."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            scale = self.lora_alpha / a.shape[-1]
            y = y + scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
        return y


class Conv(nn.Module):
    """A two-dimensional convolution, stride and padding given, channels last, in the precision of the input.

    Attributes:
      features: output channels.
      kernel_size: side of the square window.
      stride: step in both directions.
      padding: rows and columns added to a picture: ((top, bottom), (left, right)).
      interleaved: pictures whose columns take turns in one wide picture; each is convolved by itself.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, in]` to `[B, H', W', features]`; `[B, H, W * interleaved, in]` with stride 1 where pictures take turns."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, rows, columns = kernel.astype(x.dtype), self.padding[0], tuple(self.interleaved * side for side in self.padding[1])
        if self.kernel_size == 1 and self.stride == 1:
            return constrain(x @ kernel[0, 0] + bias.astype(x.dtype), "batch")
        if self.interleaved > 1 and x.shape[-1] <= NARROW:
            kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, max(WIDE - self.features, 0))))
        y = lax.conv_general_dilated(
            x, kernel, (self.stride, self.stride), (rows, columns), rhs_dilation=(1, self.interleaved),
            dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return constrain(y[..., :self.features] + bias.astype(x.dtype), "batch")
