"""Adaptive layer norms of diffusion transformers, and the embedding of their noise level."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uae_jax.nn.constrain import constrain
from uae_jax.nn.norms import LayerNorm

TIMESTEP_CHANNELS = 256


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
