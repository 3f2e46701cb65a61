"""Affine maps with optional low-rank adapters."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.nn import int8
from uae_jax.nn.cpu import linear as cpu
from uae_jax.nn.device import platform


def adapted(
    x: Float[Array, "... fan_in"],
    kernel: Float[Array, "fan_in fan_out"],
    a: Float[Array, "fan_in rank"],
    b: Float[Array, "rank fan_out"],
    scale: float,
) -> Float[Array, "... fan_out"]:
    """`x @ kernel + scale * x @ a @ b` (LoRA, arXiv 2106.09685, eq. 3).

    Many tokens in float32 on a CPU are multiplied with the sum of kernel and adapter. The matrix units of TPUs and GPUs
    round float32 operands by default, so that the sum would round a young adapter away there.

    Args:
      x: tokens; the result has the precision of `x`.
      kernel: frozen or trained.
      a, b: the adapter's factors.
      scale: alpha / rank.
    """
    if platform() == "cpu" and cpu.merging_is_less_work(x, kernel):
        return cpu.merged_product(x, kernel.astype(x.dtype), a.astype(x.dtype), b.astype(x.dtype), scale)
    # the scale meets the narrow product: behind the wide one a GPU would read and write all tokens once more for it
    return x @ kernel.astype(x.dtype) + low_rank(x, a, b, scale)


def low_rank(
    x: Float[Array, "... fan_in"], a: Float[Array, "fan_in rank"], b: Float[Array, "rank fan_out"], scale: float
) -> Float[Array, "... fan_out"]:
    """`scale * x @ a @ b`, in the precision of `x`."""
    return (scale * (x @ a.astype(x.dtype))) @ b.astype(x.dtype)


class Dense(nn.Module):
    """`x @ kernel + bias`, or `adapted` with it where an adapter is given.

    The adapter lives in the variable collection `lora` under the module's own path: applying a model without that
    collection is the reference model. The computation has the precision of the input. A kernel of 8 bits has its scales
    in the collection `int8.SCALES`.

    Attributes:
      features: output width.
      use_bias: whether a bias is added.
      lora_alpha: numerator of the adapter's scale; the rank is read from the adapter.
    """

    features: int
    use_bias: bool = True
    lora_alpha: float = 64.0

    @nn.compact
    def __call__(self, x: Float[Array, "... fan_in"]) -> Float[Array, "... fan_out"]:
        """Maps the last axis to `features` numbers."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        if self.has_variable(int8.SCALES, "kernel"):
            y = (x @ kernel.astype(x.dtype)) * self.get_variable(int8.SCALES, "kernel").astype(x.dtype)
            if self.has_variable("lora", "a"):
                a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
                y = y + low_rank(x, a, b, self.lora_alpha / a.shape[-1])
        elif self.has_variable("lora", "a"):
            a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
            y = adapted(x, kernel, a, b, self.lora_alpha / a.shape[-1])
        else:
            y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(x.dtype)
        return y
