"""The auto-encoder of FLUX.2: latents of 2 x 2 patches, normalised by the statistics of a batch norm.

A patch has its channels in the order (channel, row, column). All arithmetic is float32. C is the channels of a patch.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax import trees
from uae_jax.models.autoencoder.blocks import Decoder, Encoder, abstract_ends, decode_in_chunks, encode_moments
from uae_jax.models.flux2.config import VAEConfig
from uae_jax.nn.conv import Conv


def patchify(latents: Float[Array, "b rows columns c"]) -> Float[Array, "b rows/2 columns/2 4*c"]:
    """2 x 2 latents as one, each with its channels as (channel, row, column)."""
    batch, rows, columns, channels = latents.shape
    x = latents.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, rows // 2, columns // 2, 4 * channels)


def unpatchify(patches: Float[Array, "b rows columns c"]) -> Float[Array, "b 2*rows 2*columns c/4"]:
    """The inverse of `patchify`."""
    batch, rows, columns, channels = patches.shape
    x = patches.reshape(batch, rows, columns, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * rows, 2 * columns, channels // 4)


def _pointwise(params: trees.Tree, x: Array) -> Array:
    """A 1x1 convolution."""
    conv = Conv(params["kernel"].shape[-1], kernel_size=1, padding=((0, 0), (0, 0)))
    return cast(Array, conv.apply({"params": params}, x))


def encode(
    config: VAEConfig, params: trees.Tree, pixels: Float[Array, "b height width rgb"]
) -> tuple[Float[Array, "b rows columns c"], Float[Array, "b rows columns c"]]:
    """Mean and log-variance of the patches of images; see `encode_moments`."""

    def moments(pixels: Array) -> Array:
        encoded = cast(Array, Encoder(config.sizes).apply({"params": params["encoder"]}, pixels))
        return _pointwise(params["quant_conv"], encoded)

    mean, log_variance = encode_moments(moments, pixels, config.downsampling)
    return patchify(mean), patchify(log_variance)


def _statistics(config: VAEConfig, params: trees.Tree) -> tuple[Array, Array]:
    statistics = params["bn"]
    deviation = jnp.sqrt(statistics["variance"].astype(jnp.float32) + config.batch_norm_eps)
    return statistics["mean"].astype(jnp.float32), deviation


def to_model_latents(
    config: VAEConfig, params: trees.Tree, latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """Patches in the scale of the diffusion model, `(z - mean) / deviation` of each channel."""
    mean, deviation = _statistics(config, params)
    return (latents - mean) / deviation


def from_model_latents(
    config: VAEConfig, params: trees.Tree, model_latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """The inverse of `to_model_latents`."""
    mean, deviation = _statistics(config, params)
    return model_latents * deviation + mean


def decode_latents(
    config: VAEConfig, params: trees.Tree, model_latents: Float[Array, "b rows columns c"], chunk: int | None = None
) -> Float[Array, "b height width rgb"]:
    """Images of the diffusion model's patches; see `autoencoder.blocks.decode_in_chunks`, with its error."""

    def one(latents: Array) -> Array:
        read = _pointwise(params["post_quant_conv"], latents)
        return cast(Array, Decoder(config.sizes).apply({"params": params["decoder"]}, read))

    patches = from_model_latents(config, params, model_latents.astype(jnp.float32))
    return decode_in_chunks(one, unpatchify(patches), chunk)


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: VAEConfig) -> dict[str, Any]:
    """Shapes of `{"encoder", "decoder", "quant_conv", "post_quant_conv", "bn"}`, without computing anything."""
    ends, latent = (Encoder(config.sizes), Decoder(config.sizes)), config.latent_channels

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def pointwise(channels: int) -> dict[str, Any]:
        return {"kernel": leaf(1, 1, channels, channels), "bias": leaf(channels)}

    return {
        **abstract_ends(*ends, config.sizes.downsampling, config.in_channels, latent),
        "quant_conv": pointwise(2 * latent),
        "post_quant_conv": pointwise(latent),
        "bn": {"mean": leaf(config.channels), "variance": leaf(config.channels)},
    }
