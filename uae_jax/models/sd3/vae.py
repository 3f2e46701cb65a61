"""The 16-channel auto-encoder of SD3 (AutoencoderKL; arXiv 2112.10752, section 3.1, and 2403.03206, section 2.1).

Channels are last everywhere; all arithmetic is float32.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uae_jax import trees
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.nn.attention import attention
from uae_jax.nn.conv import Conv, DoublingConv
from uae_jax.nn.images import over_images, to_images, to_tokens
from uae_jax.nn.linear import Dense
from uae_jax.nn.norms import GroupNorm


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

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
        """C is the width of the lowest resolution."""
        width, groups = self.config.block_out_channels[-1], self.config.norm_num_groups
        x = ResidualBlock(width, groups, name="resnets_0")(x)
        if self.config.mid_block_add_attention:
            x = SpatialAttention(groups, name="attention")(x)
        return ResidualBlock(width, groups, name="resnets_1")(x)


class Encoder(nn.Module):
    """Images to the mean and log-variance of their latents, joined along channels."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b height width rgb"]) -> Float[Array, "b rows columns moments"]:
        """`[B, H, W, 3]` to `[B, h, w, 2 C]`."""
        config = self.config
        x = Conv(config.block_out_channels[0], name="conv_in")(x)
        for level, features in enumerate(config.block_out_channels):
            for layer in range(config.layers_per_block):
                x = ResidualBlock(features, config.norm_num_groups, name=f"down_blocks_{level}_resnets_{layer}")(x)
            if level < len(config.block_out_channels) - 1:
                # the published weights expect padding at the bottom and right only
                x = Conv(features, stride=2, padding=((0, 1), (0, 1)), name=f"down_blocks_{level}_downsampler")(x)
        x = MiddleBlock(config, name="mid_block")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to images."""

    config: VAEConfig

    @nn.compact
    def __call__(self, z: Float[Array, "b rows columns c"]) -> Float[Array, "b height width rgb"]:
        """`[B, h, w, C]` to `[B, H, W, 3]`."""
        config = self.config
        x = Conv(config.block_out_channels[-1], name="conv_in")(z)
        x = MiddleBlock(config, name="mid_block")(x)
        for level, features in enumerate(reversed(config.block_out_channels)):
            for layer in range(config.layers_per_block + 1):
                x = ResidualBlock(features, config.norm_num_groups, name=f"up_blocks_{level}_resnets_{layer}")(x)
            if level < len(config.block_out_channels) - 1:
                x = DoublingConv(features, name=f"up_blocks_{level}_upsampler")(x)
        x = nn.silu(GroupNorm(config.norm_num_groups, name="conv_norm_out")(x))
        return Conv(config.out_channels, name="conv_out")(x)


def encode(
    config: VAEConfig, params: trees.Tree, pixels: Float[Array, "b height width rgb"]
) -> tuple[Float[Array, "b rows columns c"], Float[Array, "b rows columns c"]]:
    """The distribution of the latents of images.

    Args:
      config: sizes.
      params: parameters of the auto-encoder; only `encoder` is read.
      pixels: in [-1, 1]; height and width are multiples of `config.downsampling`.

    Returns:
      Mean and log-variance (clipped to [-30, 20], as published) in float32.

    Raises:
      ValueError: height or width is not such a multiple.
    """
    height, width = pixels.shape[1:3]
    if height % config.downsampling or width % config.downsampling:
        raise ValueError(
            f"an image of {height}x{width} does not divide into latents; both must be multiples of "
            f"{config.downsampling}"
        )
    with jax.named_scope("autoencoder"):
        moments = cast(Array, Encoder(config).apply({"params": params["encoder"]}, pixels.astype(jnp.float32)))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def sample_latents(
    key: Key[Array, ""], mean: Float[Array, "*shape"], log_variance: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """One sample from the Gaussian of `encode` (arXiv 1312.6114, eq. 10)."""
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)


def to_model_latents(config: VAEConfig, latents: Float[Array, "b rows columns c"]) -> Float[Array, "b rows columns c"]:
    """Latents of the auto-encoder in the scale of the diffusion model, `(z - shift) * scale`."""
    return (latents - config.shift_factor) * config.scaling_factor


def from_model_latents(
    config: VAEConfig, model_latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """The inverse of `to_model_latents`."""
    return model_latents / config.scaling_factor + config.shift_factor


def decode(
    config: VAEConfig, params: trees.Tree, latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b height width rgb"]:
    """Images of the auto-encoder's latents.

    Args:
      config: sizes.
      params: parameters of the auto-encoder; only `decoder` is read.
      latents: in the scale of `encode`.

    Returns:
      Pixels in float32, about [-1, 1], not clipped.
    """
    with jax.named_scope("autoencoder"):
        return cast(Array, Decoder(config).apply({"params": params["decoder"]}, latents.astype(jnp.float32)))


def decode_latents(
    config: VAEConfig, params: trees.Tree, model_latents: Float[Array, "b rows columns c"], chunk: int | None = None
) -> Float[Array, "b height width rgb"]:
    """Images of the diffusion model's latents, some at a time when memory is short.

    Each chunk takes every (B / chunk)-th row: a batch that is sharded over devices then stays where it is when their
    number divides `chunk`. The backward pass recomputes the activations of a chunk.

    Args:
      config: sizes.
      params: parameters of the auto-encoder.
      model_latents: in the scale of the diffusion model.
      chunk: images decoded at once; None, or B and more, decodes all at once.

    Returns:
      Pixels in float32, about [-1, 1], not clipped.

    Raises:
      ValueError: `chunk` does not divide B.
    """
    latents = from_model_latents(config, model_latents.astype(jnp.float32))
    batch = latents.shape[0]
    chunk = batch if chunk is None else min(chunk, batch)
    if chunk < 1 or batch % chunk:
        raise ValueError(
            f"a batch of {batch} latents cannot be decoded in chunks of {chunk}; take a divisor of {batch}"
        )

    def decode_part(part: Array) -> Array:
        return over_images(functools.partial(decode, config, params), part)

    if chunk == batch:
        return decode_part(latents)
    return trees.map_parts(jax.checkpoint(decode_part), trees.cut(latents, batch // chunk))


def init_params(config: VAEConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New parameters `{"encoder", "decoder"}` in float32; kernels have variance 1 / fan-in, biases are zero."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.downsampling
    pixels = jnp.zeros((1, side, side, config.in_channels), jnp.float32)
    latents = jnp.zeros((1, 1, 1, config.latent_channels), jnp.float32)
    return {
        "encoder": Encoder(config).init(encoder_key, pixels)["params"],
        "decoder": Decoder(config).init(decoder_key, latents)["params"],
    }


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: VAEConfig) -> dict[str, Any]:
    """The shapes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
