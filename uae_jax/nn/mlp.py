"""Perceptrons that map each token by itself."""

import flax.linen as nn
from jaxtyping import Array, Float

from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense


class MLP(nn.Module):
    """Linear, GELU with the error function, linear.

    Attributes:
      hidden: inner width.
      features: output width.
    """

    hidden: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d_out"]:
        """Maps the last axis to `features` numbers."""
        inner = nn.gelu(Dense(self.hidden, name="first")(x), approximate=False)
        return Dense(self.features, name="second")(_hidden(inner))


class TanhMLP(nn.Module):
    """Linear, GELU in its tanh form, linear to the same width.

    Attributes:
      inner: inner width.
      lora_alpha: numerator of the adapters' scale.
    """

    inner: int
    lora_alpha: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Each token by itself."""
        y = nn.gelu(Dense(self.inner, lora_alpha=self.lora_alpha, name="up")(x), approximate=True)
        return Dense(x.shape[-1], lora_alpha=self.lora_alpha, name="down")(_hidden(y))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    inner: int
    use_bias: bool = False
    lora_alpha: float = 64.0

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Each token by itself."""

        def dense(name: str, features: int) -> Dense:
            return Dense(features, use_bias=self.use_bias, lora_alpha=self.lora_alpha, name=name)

        gated = nn.silu(dense("gate", self.inner)(x)) * dense("up", self.inner)(x)
        return dense("down", x.shape[-1])(_hidden(gated))


def _hidden(inner: Array) -> Array:
    return constrain(inner, "batch", *[None] * (inner.ndim - 2), "hidden")
