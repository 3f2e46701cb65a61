"""Normalisations; statistics are always float32, the result has the precision of the input."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from uae_jax.nn.apart import settle


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467, eq. 4)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450); `affine=False` has no parameters."""

    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, -1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        y = (x32 - mean) * lax.rsqrt(variance + self.epsilon)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            y = y * scale.astype(jnp.float32) + bias.astype(jnp.float32)
        return y.astype(x.dtype)


class GroupNorm(nn.Module):
    """Group norm over space and channel groups (arXiv 1803.08494).

    Attributes:
      groups: of channels.
      epsilon: added to the variance.
      interleaved: pictures in the channels (`nn.conv`); each has its own statistics.
    """

    groups: int
    epsilon: float = 1e-6
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, H, W, n C]` of n interleaved pictures to the same."""
        channels = x.shape[-1] // self.interleaved
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x32 = x.astype(jnp.float32)

        def over_groups(y: Array) -> Array:
            """`[B, H, W, n C]` to `[B, 1, 1, n C]`: the mean over space and over each channel's group.

            Only the small result of the mean over space is cut into groups: cutting the picture's channels splits the
            lanes of a TPU's registers, which costs time and minutes of compilation.
            """
            mean = jnp.mean(y, (-3, -2), keepdims=True)
            grouped = jnp.mean(mean.reshape(*mean.shape[:-1], self.interleaved * self.groups, -1), -1)
            return jnp.repeat(grouped, channels // self.groups, axis=-1)

        # small and needed for every pixel: the CPU backend would compute it anew for each
        mean = settle(over_groups(x32))
        variance = over_groups(jnp.square(x32 - mean))
        factor = settle(lax.rsqrt(variance + self.epsilon) * jnp.tile(scale, self.interleaved))
        shift = settle(jnp.tile(bias, self.interleaved) - mean * factor)
        return (x32 * factor + shift).astype(x.dtype)
