"""Normalisations; statistics are always float32, the result has the precision of the input."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from uae_jax.nn.cpu.calls import materialised
from uae_jax.nn.images import for_every_image, image_channels


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"], epsilon: float) -> Float[Array, "... d"]:
    """Root-mean-square norm over the last axis (arXiv 1910.07467, eq. 4), in the precision of `x`."""
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + epsilon)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class NormScale(nn.Module):
    """The scale of an `RMSNorm` that is computed elsewhere, under the same name."""

    @nn.compact
    def __call__(self, width: int) -> Float[Array, " width"]:
        """One number for each of so many features."""
        return self.param("scale", nn.initializers.ones, (width,), jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467, eq. 4)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises over the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.epsilon)


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450); `affine=False` has no parameters."""

    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises over the last axis."""
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
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        """Normalises each image; the layout of the images is that of `nn.images`."""
        channels = image_channels(x)
        width = channels // self.groups
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x32 = x.astype(jnp.float32)

        def over_groups(y: Array) -> Array:
            """`[B, H, W, C]` to `[B, 1, 1, C]`: the mean over space and over each channel's group.

            Only the small mean over space is split into groups. To split the channels of the image would split the
            lanes of a TPU's registers, which costs time and minutes of compilation.
            """
            mean = jnp.mean(y, (-3, -2), keepdims=True)
            grouped = jnp.mean(mean.reshape(*mean.shape[:-1], -1, width), -1)
            return jnp.repeat(grouped, width, axis=-1)

        # what is small and needed for every pixel is computed once
        mean = materialised(over_groups(x32))
        variance = over_groups(jnp.square(x32 - mean))
        factor = materialised(lax.rsqrt(variance + self.epsilon) * for_every_image(scale))
        shift = materialised(for_every_image(bias) - mean * factor)
        return (x32 * factor + shift).astype(x.dtype)
