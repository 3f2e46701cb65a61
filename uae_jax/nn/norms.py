"""Normalisations; statistics are always float32, the result has the precision of the input."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax


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
      interleaved: pictures whose columns take turns in one wide picture; each has its own statistics.
    """

    groups: int
    epsilon: float = 1e-6
    interleaved: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, H, W, C]` (W * interleaved columns where pictures take turns) to the same."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        width = self.interleaved * channels
        x32 = x.reshape(*x.shape[:-2], -1, width).astype(jnp.float32)

        def over_groups(y: Array) -> Array:
            """`[B, H, W, n C]` to `[B, 1, 1, n C]`: the mean over space and over each channel's group.

            Only the small result of the mean over space is cut into groups: cutting the picture's channels splits the lanes
            of a TPU's registers, which costs time and minutes of compilation.
            """
            mean = jnp.mean(y, (-3, -2), keepdims=True)
            grouped = jnp.mean(mean.reshape(*mean.shape[:-1], self.interleaved * self.groups, -1), -1)
            return jnp.repeat(grouped, channels // self.groups, axis=-1)

        # behind barriers what is small and needed for every pixel: XLA's CPU backend would compute it anew for each
        mean = lax.optimization_barrier(over_groups(x32))
        variance = over_groups(jnp.square(x32 - mean))
        factor = lax.rsqrt(variance + self.epsilon) * jnp.tile(scale, self.interleaved)
        factor, shift = lax.optimization_barrier((factor, jnp.tile(bias, self.interleaved) - mean * factor))
        return (x32 * factor + shift).reshape(x.shape).astype(x.dtype)
