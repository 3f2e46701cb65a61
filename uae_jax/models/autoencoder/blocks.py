"""Convolutional encoder and decoder of images (arXiv 2112.10752, section 3.1; 2012.09841, table 7).

Channels are last everywhere; all arithmetic is float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uae_jax import trees
from uae_jax.nn.attention import attention
from uae_jax.nn.conv import Conv, DoublingConv
from uae_jax.nn.images import over_images, to_images, to_tokens
from uae_jax.nn.linear import Dense
from uae_jax.nn.norms import GroupNorm


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of encoder and decoder.

    Attributes:
      widths: of each resolution; each step between two halves height and width.
      layers: residual blocks a resolution in the encoder; the decoder has one more.
      groups: of every group norm.
      encoded: channels that the encoder makes.
      latent: channels that the decoder reads.
      channels: of the images.
      middle_attention: whether the middle block has self-attention.
      lowest_attention: whether self-attention follows each residual block of the lowest resolution.
    """

    widths: tuple[int, ...]
    layers: int
    groups: int
    encoded: int
    latent: int
    channels: int = 3
    middle_attention: bool = True
    lowest_attention: bool = False

    @property
    def downsampling(self) -> int:
        """Image side divided by latent side."""
        return 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions after group norm and SiLU, with a 1x1 shortcut where the width changes."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width features"]:
        """Images of C channels to images of `features` channels."""
        y = Conv(self.features, name="conv1")(nn.silu(GroupNorm(self.groups, name="norm1")(x)))
        y = Conv(self.features, name="conv2")(nn.silu(GroupNorm(self.groups, name="norm2")(y)))
        if x.shape[-1] != y.shape[-1]:
            x = Conv(self.features, kernel_size=1, padding=((0, 0), (0, 0)), name="conv_shortcut")(x)
        return x + y


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
        """Mixes the positions of each image."""
        y = to_tokens(GroupNorm(self.groups, name="group_norm")(x))
        width = y.shape[-1]
        query, key, value = (Dense(width, name=name)(y)[:, :, None] for name in ("query", "key", "value"))
        y = Dense(width, name="output")(attention(query, key, value)[:, :, 0])
        return x + to_images(y, *x.shape[1:3])


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
        """C is the width of the lowest resolution."""
        width, groups = self.sizes.widths[-1], self.sizes.groups
        x = ResidualBlock(width, groups, name="resnets_0")(x)
        if self.sizes.middle_attention:
            x = SpatialAttention(groups, name="attention")(x)
        return ResidualBlock(width, groups, name="resnets_1")(x)


def _level(sizes: Sizes, x: Array, name: str, features: int, layers: int, lowest: bool) -> Array:
    """The residual blocks of one resolution; the modules belong to the caller."""
    for layer in range(layers):
        x = ResidualBlock(features, sizes.groups, name=f"{name}_resnets_{layer}")(x)
        if lowest and sizes.lowest_attention:
            x = SpatialAttention(sizes.groups, name=f"{name}_attentions_{layer}")(x)
    return x


class Encoder(nn.Module):
    """Images to their codes, or to what the codes are sampled from."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: Float[Array, "b height width rgb"]) -> Float[Array, "b rows columns encoded"]:
        """`[B, H, W, 3]` to `[B, h, w, encoded]`."""
        sizes, last = self.sizes, len(self.sizes.widths) - 1
        x = Conv(sizes.widths[0], name="conv_in")(x)
        for level, features in enumerate(sizes.widths):
            x = _level(sizes, x, f"down_blocks_{level}", features, sizes.layers, level == last)
            if level < last:
                # the published weights expect padding at the bottom and right only
                x = Conv(features, stride=2, padding=((0, 1), (0, 1)), name=f"down_blocks_{level}_downsampler")(x)
        x = MiddleBlock(sizes, name="mid_block")(x)
        x = nn.silu(GroupNorm(sizes.groups, name="conv_norm_out")(x))
        return Conv(sizes.encoded, name="conv_out")(x)


class Decoder(nn.Module):
    """Codes to images."""

    sizes: Sizes

    @nn.compact
    def __call__(self, z: Float[Array, "b rows columns c"]) -> Float[Array, "b height width rgb"]:
        """`[B, h, w, C]` to `[B, H, W, 3]`."""
        sizes, last = self.sizes, len(self.sizes.widths) - 1
        x = Conv(sizes.widths[-1], name="conv_in")(z)
        x = MiddleBlock(sizes, name="mid_block")(x)
        for level, features in enumerate(reversed(sizes.widths)):
            x = _level(sizes, x, f"up_blocks_{level}", features, sizes.layers + 1, level == 0)
            if level < last:
                x = DoublingConv(features, name=f"up_blocks_{level}_upsampler")(x)
        x = nn.silu(GroupNorm(sizes.groups, name="conv_norm_out")(x))
        return Conv(sizes.channels, name="conv_out")(x)


def abstract_ends(encoder: nn.Module, decoder: nn.Module, side: int, channels: int, latent: int) -> dict[str, Any]:
    """Shapes of `{"encoder", "decoder"}`, without computing anything.

    Args:
      encoder, decoder: the two networks.
      side: of the smallest image.
      channels: of images.
      latent: channels that the decoder reads.
    """
    key = jax.random.key(0)
    pixels = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 1, 1, latent), jnp.float32)
    return {
        "encoder": jax.eval_shape(encoder.init, key, pixels)["params"],
        "decoder": jax.eval_shape(decoder.init, key, latents)["params"],
    }


def encode_moments(
    encode: Callable[[Array], Array], pixels: Float[Array, "b height width rgb"], downsampling: int
) -> tuple[Float[Array, "b rows columns c"], Float[Array, "b rows columns c"]]:
    """The distribution of the latents of images.

    Args:
      encode: makes means, and behind them log-variances.
      pixels: in [-1, 1].
      downsampling: image side divided by latent side.

    Returns:
      Mean and log-variance (clipped to [-30, 20], as published) in float32.

    Raises:
      ValueError: height or width is not a multiple of `downsampling`.
    """
    height, width = pixels.shape[1:3]
    if height % downsampling or width % downsampling:
        raise ValueError(
            f"an image of {height}x{width} does not divide into latents; both must be multiples of {downsampling}"
        )
    with jax.named_scope("autoencoder"):
        mean, log_variance = jnp.split(encode(pixels.astype(jnp.float32)), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def sample_latents(
    key: Key[Array, ""], mean: Float[Array, "*shape"], log_variance: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """One sample from the Gaussian that an encoder makes (arXiv 1312.6114, eq. 10)."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)


def decode_in_chunks(
    decode: Callable[[Array], Array], latents: Float[Array, "b rows columns c"], chunk: int | None = None
) -> Float[Array, "b height width rgb"]:
    """Images of latents, some at a time when memory is short.

    Each chunk takes every (B / chunk)-th row: a batch that is sharded over devices then stays where it is when their
    number divides `chunk`. The backward pass recomputes the activations of a chunk.

    Args:
      decode: of a batch.
      latents: of all images.
      chunk: images decoded at once; None, or B and more, decodes all at once.

    Raises:
      ValueError: `chunk` does not divide B.
    """
    batch = latents.shape[0]
    chunk = batch if chunk is None else min(chunk, batch)
    if chunk < 1 or batch % chunk:
        raise ValueError(
            f"a batch of {batch} latents cannot be decoded in chunks of {chunk}; take a divisor of {batch}"
        )

    def decode_part(part: Array) -> Array:
        with jax.named_scope("autoencoder"):
            return over_images(decode, part)

    if chunk == batch:
        return decode_part(latents)
    return trees.map_parts(jax.checkpoint(decode_part), trees.cut(latents, batch // chunk))
