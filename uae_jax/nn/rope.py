"""Rotary position embedding (arXiv 2104.09864), in the half-split form of language models and that of the paper."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
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


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each number of a head, neighbours (2 i, 2 i + 1) alike, float32."""

    cosine: Float[Array, "*b t k"]
    sine: Float[Array, "*b t k"]


def axial_rotation(positions: Float[np.ndarray, "*b t axes"], widths: Sequence[int], theta: float) -> Rotation:
    """The rotation of positions that have several axes, each of which turns its own part of a head.

    The angles are computed on the host in float64, as in diffusers.

    Args:
      positions: of each token along each axis.
      widths: numbers of a head that belong to each axis; they sum to K.
      theta: base of the frequencies.
    """
    angles = [
        positions[..., axis, None].astype(np.float64) * theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        for axis, width in enumerate(widths)
    ]
    both = np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1)
    return Rotation(jnp.asarray(np.cos(both), jnp.float32), jnp.asarray(np.sin(both), jnp.float32))


def apply_paired_rope(x: Float[Array, "*b t h k"], rotation: Rotation) -> Float[Array, "*b t h k"]:
    """Rotates the neighbours (2 i, 2 i + 1) of each head, as diffusion transformers do.

    Args:
      x: `[B, T, H, K]`.
      rotation: of the tokens, the same for all heads, and for all rows where it has no batch axis.

    Returns:
      `[B, T, H, K]` in the precision of `x`; the rotation is float32.
    """
    wide = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    turned = jnp.where(even, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * rotation.cosine[..., None, :] + turned * rotation.sine[..., None, :]).astype(x.dtype)
