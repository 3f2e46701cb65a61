"""Affine maps with optional low-rank adapters."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from uae_jax.nn.constrain import constrain


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
      padding: rows and columns added: ((top, bottom), (left, right)).
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, H, W, in]` to `[B, H', W', features]`."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        y = lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (self.stride, self.stride), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return constrain(y + bias.astype(x.dtype), "batch")
