"""The image tokenizer of Janus: images to codes and back (VQ-16 of LlamaGen, arXiv 2406.06525, section 2.1).

Rows of the codebook count by their direction alone: they are normalised at every lookup, and so are the vectors that
are compared with them. All arithmetic is float32.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from uae_jax import trees
from uae_jax.models.autoencoder.blocks import Decoder, Encoder, decode_in_chunks
from uae_jax.models.janus.config import VQConfig
from uae_jax.nn.linear import Dense

NORM_EPSILON = 1e-12  # of torch's normalize


def init_params(config: VQConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters, float32: `encoder`, `decoder`, `quant`, `post_quant`, and the `codebook`'s table."""
    keys = {name: trees.name_key(key, name) for name in ("encoder", "decoder", "quant", "post_quant", "codebook")}
    pixels = jnp.zeros((1, config.sizes.downsampling, config.sizes.downsampling, config.channels))
    latents = jnp.zeros((1, 1, 1, config.latent))
    codes = jax.random.normal(keys["codebook"], (config.codes, config.code_width))
    return {
        "encoder": Encoder(config.sizes).init(keys["encoder"], pixels)["params"],
        "decoder": Decoder(config.sizes).init(keys["decoder"], latents)["params"],
        "quant": Dense(config.code_width).init(keys["quant"], latents)["params"],
        "post_quant": Dense(config.latent).init(keys["post_quant"], codes[:1])["params"],
        "codebook": {"table": unit(codes)},
    }


def unit(vectors: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
    """Vectors of length 1."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), NORM_EPSILON)


def code_grid(config: VQConfig, params: trees.Tree, tokens: Int[Array, "b t"]) -> Float[Array, "b grid grid d"]:
    """The unit codes of image tokens, which are in reading order."""
    codes = jnp.take(params["codebook"]["table"].astype(jnp.float32), tokens, axis=0)
    return unit(codes).reshape(len(tokens), config.grid, config.grid, config.code_width)


def decode(
    config: VQConfig, params: trees.Tree, tokens: Int[Array, "b t"], chunk: int | None = None
) -> Float[Array, "b height width c"]:
    """Images of tokens.

    Args:
      config: sizes.
      params: parameters of the tokenizer; the encoder is not read.
      tokens: `config.tokens` of each image.
      chunk: images decoded at once, see `decode_in_chunks`.

    Returns:
      Pixels in float32, about [-1, 1], not clipped.
    """
    return decode_codes(config, params, code_grid(config, params, tokens), chunk)


def decode_codes(
    config: VQConfig, params: trees.Tree, codes: Float[Array, "b grid grid d"], chunk: int | None = None
) -> Float[Array, "b height width c"]:
    """`decode` of unit codes; differentiable."""
    latents = _dense(config.latent, params["post_quant"], codes)
    decoder = functools.partial(Decoder(config.sizes).apply, {"params": params["decoder"]})
    with jax.named_scope("autoencoder"):
        return decode_in_chunks(cast(Any, decoder), latents, chunk)


def encode(config: VQConfig, params: trees.Tree, pixels: Float[Array, "b height width c"]) -> Int[Array, "b t"]:
    """The tokens of images by the official rule: the code in the nearest direction.

    transformers compares plain vectors instead, which is another rule unless all rows of the codebook have length 1.

    Args:
      config: sizes.
      params: parameters of the tokenizer; the decoder is not read.
      pixels: in [-1, 1], of `config.image_size`.

    Returns:
      int32, in reading order.

    Raises:
      ValueError: images of another size.
    """
    if pixels.shape[1:3] != (config.image_size, config.image_size):
        raise ValueError(f"Janus's tokenizer takes images of {config.image_size} pixels, not {pixels.shape[1:3]}")
    vectors = unit(features(config, params, pixels))
    table = unit(params["codebook"]["table"].astype(jnp.float32))
    likeness = jnp.einsum("bhwd,nd->bhwn", vectors, table, precision="highest")
    return jnp.argmax(likeness, axis=-1).reshape(len(pixels), -1).astype(jnp.int32)


def features(
    config: VQConfig, params: trees.Tree, pixels: Float[Array, "b height width c"]
) -> Float[Array, "b grid grid d"]:
    """Vectors of images, of any length; differentiable."""
    with jax.named_scope("autoencoder"):
        found = Encoder(config.sizes).apply({"params": params["encoder"]}, pixels.astype(jnp.float32))
    return _dense(config.code_width, params["quant"], cast(Array, found))


def _dense(features: int, params: trees.Tree, x: Array) -> Array:
    return cast(Array, Dense(features).apply({"params": params}, x))
