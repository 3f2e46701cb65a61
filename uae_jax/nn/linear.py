"""Affine maps with optional low-rank adapters."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.nn.device import platform


def adapted(x: Array, kernel: Array, a: Array, b: Array, scale: float) -> Array:
    """`x @ kernel + scale * x @ a @ b`, in the order of products that is least work (LoRA, arXiv 2106.09685, eq. 3).

    On CPUs, in float32, more than about in * out / (in + out) tokens are multiplied with `kernel + scale * a @ b`. In
    half precision that sum would round a young adapter away, and so would the matrix units of TPUs and GPUs, which
    round float32 operands by default: there all tokens pass through the adapter, as few of them do on CPUs.

    Args:
      x: `[..., in]`.
      kernel: `[in, out]`.
      a: `[in, rank]`.
      b: `[rank, out]`.
      scale: alpha / rank.

    Returns:
      `[..., out]` in the precision of `x`.
    """
    tokens, (fan_in, fan_out) = math.prod(x.shape[:-1]), kernel.shape
    if platform() == "cpu" and x.dtype == jnp.float32 and tokens * (fan_in + fan_out) > fan_in * fan_out:
        return _merged_product(x, kernel.astype(x.dtype), a.astype(x.dtype), b.astype(x.dtype), scale)
    # the scale meets the narrow product: behind the wide one a GPU would read and write all tokens once more for it
    return x @ kernel.astype(x.dtype) + (scale * (x @ a.astype(x.dtype))) @ b.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _merged_product(x: Array, kernel: Array, a: Array, b: Array, scale: float) -> Array:
    return x @ (kernel + scale * (a @ b))


def _merged_forward(x: Array, kernel: Array, a: Array, b: Array, scale: float) -> tuple[Array, tuple]:
    return _merged_product(x, kernel, a, b, scale), (x, kernel, a, b)


def _merged_backward(scale: float, saved: tuple, gradient: Array) -> tuple[Array, Array, Array, Array]:
    """By way of the adapter: differentiating the sum of kernels takes as much work as training the kernel."""
    x, kernel, a, b = saved
    rows, outer = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    through = scale * (outer @ b.T)
    return gradient @ (kernel + scale * (a @ b)).T, rows.T @ outer, rows.T @ through, scale * ((rows @ a).T @ outer)


_merged_product.defvjp(_merged_forward, _merged_backward)


class Dense(nn.Module):
    """`x @ kernel + bias`, or `adapted` with it where an adapter is given.

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
        if self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = adapted(x, kernel, a, b, self.lora_alpha / a.shape[-1])
        else:
            y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y
