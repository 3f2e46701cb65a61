"""The 16-channel auto-encoder of SD3 (AutoencoderKL; arXiv 2112.10752, section 3.1, and 2403.03206, section 2.1).

Channels are last everywhere; all arithmetic is float32.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uae_jax import trees
from uae_jax.models.autoencoder.blocks import Decoder, Encoder, abstract_ends, decode_in_chunks, encode_moments
from uae_jax.models.sd3.config import VAEConfig


def encode(
    config: VAEConfig, params: trees.Tree, pixels: Float[Array, "b height width rgb"]
) -> tuple[Float[Array, "b rows columns c"], Float[Array, "b rows columns c"]]:
    """Mean and log-variance of the latents of images; see `encode_moments`. Only `encoder` of `params` is read."""
    encoder = functools.partial(Encoder(config.sizes).apply, {"params": params["encoder"]})
    return encode_moments(cast(Callable[[Array], Array], encoder), pixels, config.downsampling)


def to_model_latents(
    config: VAEConfig, params: trees.Tree, latents: Float[Array, "b rows columns c"]
) -> Float[Array, "b rows columns c"]:
    """Latents of the auto-encoder in the scale of the diffusion model, `(z - shift) * scale`; `params` is not read."""
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
    return cast(Array, Decoder(config.sizes).apply({"params": params["decoder"]}, latents.astype(jnp.float32)))


def decode_latents(
    config: VAEConfig, params: trees.Tree, model_latents: Float[Array, "b rows columns c"], chunk: int | None = None
) -> Float[Array, "b height width rgb"]:
    """Images of the diffusion model's latents, some at a time when memory is short.

    Args:
      config: sizes.
      params: parameters of the auto-encoder.
      model_latents: in the scale of the diffusion model.
      chunk: images decoded at once, see `autoencoder.blocks.decode_in_chunks`.

    Returns:
      Pixels in float32, about [-1, 1], not clipped.

    Raises:
      ValueError: `chunk` does not divide B.
    """
    latents = from_model_latents(config, model_latents.astype(jnp.float32))
    return decode_in_chunks(functools.partial(decode, config, params), latents, chunk)


def init_params(config: VAEConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New parameters `{"encoder", "decoder"}` in float32; kernels have variance 1 / fan-in, biases are zero."""
    encoder_key, decoder_key = jax.random.split(key)
    side = config.downsampling
    pixels = jnp.zeros((1, side, side, config.in_channels), jnp.float32)
    latents = jnp.zeros((1, 1, 1, config.latent_channels), jnp.float32)
    return {
        "encoder": Encoder(config.sizes).init(encoder_key, pixels)["params"],
        "decoder": Decoder(config.sizes).init(decoder_key, latents)["params"],
    }


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: VAEConfig) -> dict[str, Any]:
    """The shapes of `init_params`, without computing anything."""
    ends = Encoder(config.sizes), Decoder(config.sizes)
    return abstract_ends(*ends, config.downsampling, config.in_channels, config.latent_channels)
