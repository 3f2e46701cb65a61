"""Adaptive layer norms of diffusion transformers, and the embedding of their noise level."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.norms import LayerNorm

TIMESTEP_CHANNELS = 256


class Modulation(nn.Module):
    """Vectors of a width from the conditioning vector, in float32 (arXiv 2212.09748, section 3.2).

    Attributes:
      width: of a vector.
      parts: their number.
      lora_alpha: numerator of the adapters' scale.
      use_bias: whether the linear map has a bias.
    """

    width: int
    parts: int
    lora_alpha: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, conditioning: Float[Array, "b d"]) -> list[Float[Array, "b 1 d"]]:
        """The vectors of each row; `conditioning` is already through SiLU."""
        linear = Dense(self.parts * self.width, use_bias=self.use_bias, lora_alpha=self.lora_alpha, name="linear")
        y = constrain(linear(constrain(conditioning, "batch")), "batch")
        return jnp.split(y[:, None].astype(jnp.float32), self.parts, axis=-1)


def modulated_norm(
    x: Float[Array, "b t d"], scale: Float[Array, "b 1 d"], shift: Float[Array, "b 1 d"], epsilon: float = 1e-6
) -> Float[Array, "b t d"]:
    """Layer norm without parameters, then `x * (1 + scale) + shift`, in float32 (arXiv 2212.09748, section 3.2).

    The result has the precision of `x`.
    """
    y = LayerNorm(epsilon, affine=False)(x.astype(jnp.float32))
    return constrain((y * (1.0 + scale) + shift).astype(x.dtype), "batch")


def gated_sum(
    x: Float[Array, "b t d"], gate: Float[Array, "b 1 d"], update: Float[Array, "b t d"]
) -> Float[Array, "b t d"]:
    """`x + gate * update`, computed in float32; the result has the precision of `x`."""
    return constrain(
        (x.astype(jnp.float32) + gate * constrain(update, "batch").astype(jnp.float32)).astype(x.dtype), "batch"
    )


def timestep_embedding(timestep: Float[Array, " b"]) -> Float[Array, "b 256"]:
    """Cosines, then sines, of the timestep at 128 frequencies from 1 to nearly 1/10000 (arXiv 2006.11239, appendix B).

    `timestep` is 1000 * sigma; the result is float32.
    """
    half = TIMESTEP_CHANNELS // 2
    frequencies = jnp.exp(-np.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
