"""Rotary position embedding in the half-split form (arXiv 2104.09864, as in Llama and Qwen)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(x: Float[Array, "... t h k"], angles: Float[Array, "... t half"]) -> Float[Array, "... t h k"]:
    """Rotates the pairs (i, i + K/2) of each head.

    Args:
      x: `[..., T, H, K]`.
      angles: `[..., T, K/2]` in radians.

    Returns:
      `[..., T, H, K]` in the precision of `x`; the rotation is float32.
    """
    cosine, sine = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)
