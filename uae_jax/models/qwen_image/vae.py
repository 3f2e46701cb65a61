"""The auto-encoder of Qwen-Image (Wan's, arXiv 2503.20314) for single images, channels last, all arithmetic float32.

A causal convolution over one frame sees zeros before it, so that of each kernel only the last time slice counts. The
convolutions over time alone do nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.models.autoencoder.blocks import abstract_ends, decode_in_chunks, encode_moments
from uae_jax.models.qwen_image.config import VAEConfig
from uae_jax.nn.attention import attention
from uae_jax.nn.conv import Conv, DoublingConv
from uae_jax.nn.images import image_channels, to_images, to_tokens

POINT = ((0, 0), (0, 0))


class ChannelNorm(nn.Module):
    """The channels of each pixel over their length, times the root of their number and a learned scale."""

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width c"]:
        """Normalises over channels; the layout of the images is that of `nn.images`."""
        channels = image_channels(x)
        scale = self.param("scale", nn.initializers.ones, (1, channels), jnp.float32)[0]
        pixels = x.reshape(*x.shape[:-1], -1, channels)
        length = jnp.maximum(jnp.linalg.norm(pixels, axis=-1, keepdims=True), 1e-12)
        return (pixels / length * channels**0.5 * scale).reshape(x.shape)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions after norm and SiLU, with a 1x1 shortcut where the width changes."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b height width features"]:
        """Images of C channels to images of `features` channels."""
        y = Conv(self.features, name="conv1")(nn.silu(ChannelNorm(name="norm1")(x)))
        y = Conv(self.features, name="conv2")(nn.silu(ChannelNorm(name="norm2")(y)))
        if x.shape[-1] != y.shape[-1]:
            x = Conv(self.features, kernel_size=1, padding=POINT, name="conv_shortcut")(x)
        return x + y


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection."""

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
        """Mixes the positions of each image."""
        width = image_channels(x)
        fused = Conv(3 * width, kernel_size=1, padding=POINT, name="query_key_value")(ChannelNorm(name="norm")(x))
        query, key, value = (part[:, :, None] for part in jnp.split(to_tokens(fused), 3, axis=-1))
        mixed = to_images(attention(query, key, value)[:, :, 0], *x.shape[1:3])
        return x + Conv(width, kernel_size=1, padding=POINT, name="output")(mixed)


def _middle(x: Array, width: int) -> Array:
    """Residual block, attention, residual block; the modules belong to the caller."""
    x = ResidualBlock(width, name="mid_resnets_0")(x)
    return ResidualBlock(width, name="mid_resnets_1")(SpatialAttention(name="mid_attention")(x))


class Encoder(nn.Module):
    """Images to mean and log-variance of their latents."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b height width rgb"]) -> Float[Array, "b rows columns encoded"]:
        """`[B, H, W, 3]` to `[B, h, w, 2 C]`."""
        config, widths = self.config, self.config.block_out_channels
        x = Conv(config.base_dim, name="conv_in")(x)
        number = 0  # the published blocks are one list
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                x, number = ResidualBlock(width, name=f"down_blocks_{number}")(x), number + 1
            if level < len(widths) - 1:
                down = Conv(width, stride=2, padding=((0, 1), (0, 1)), name=f"down_blocks_{number}")
                x, number = down(x), number + 1
        x = nn.silu(ChannelNorm(name="norm_out")(_middle(x, widths[-1])))
        x = Conv(2 * config.z_dim, name="conv_out")(x)
        return Conv(2 * config.z_dim, kernel_size=1, padding=POINT, name="quant_conv")(x)


class Decoder(nn.Module):
    """Latents to images."""

    config: VAEConfig

    @nn.compact
    def __call__(self, z: Float[Array, "b rows columns c"]) -> Float[Array, "b height width rgb"]:
        """`[B, h, w, C]` to `[B, H, W, 3]`."""
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = Conv(config.z_dim, kernel_size=1, padding=POINT, name="post_quant_conv")(z)
        x = _middle(Conv(widths[0], name="conv_in")(x), widths[0])
        for level, width in enumerate(widths):
            for layer in range(config.num_res_blocks + 1):
                x = ResidualBlock(width, name=f"up_blocks_{level}_resnets_{layer}")(x)
            if level < len(widths) - 1:
                x = DoublingConv(width // 2, name=f"up_blocks_{level}_upsampler")(x)
        x = nn.silu(ChannelNorm(name="norm_out")(x))
        return Conv(config.input_channels, name="conv_out")(x)


def encode(
    config: VAEConfig, params: trees.Tree, pixels: Float[Array, "b height width rgb"]
) -> tuple[Float[Array, "b rows columns c"], Float[Array, "b rows columns c"]]:
    """Mean and log-variance of the latents of images; see `encode_moments`."""
    encoder = functools.partial(Encoder(config).apply, {"params": params["encoder"]})
    return encode_moments(cast(Callable[[Array], Array], encoder), pixels, config.downsampling)


def to_model_latents(
    config: VAEConfig, params: trees.Tree, latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """Latents in the scale of the diffusion model, `(z - mean) / std` of each channel; `params` is not read."""
    return (latents - jnp.array(config.latents_mean)) / jnp.array(config.latents_std)


def from_model_latents(
    config: VAEConfig, latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """The inverse of `to_model_latents`."""
    return latents * jnp.array(config.latents_std) + jnp.array(config.latents_mean)


def decode_latents(
    config: VAEConfig, params: trees.Tree, model_latents: Float[Array, "b rows columns c"], chunk: int | None = None
) -> Float[Array, "b height width rgb"]:
    """Images of the diffusion model's latents; see `autoencoder.blocks.decode_in_chunks`, with its error."""
    decoder = functools.partial(Decoder(config).apply, {"params": params["decoder"]})
    latents = from_model_latents(config, model_latents.astype(jnp.float32))
    return decode_in_chunks(cast(Callable[[Array], Array], decoder), latents, chunk)


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: VAEConfig) -> dict[str, Any]:
    """Shapes of `{"encoder", "decoder"}`, without computing anything."""
    return abstract_ends(Encoder(config), Decoder(config), config.downsampling, config.input_channels, config.z_dim)
