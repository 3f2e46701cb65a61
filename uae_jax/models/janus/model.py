"""Pure functions of Janus over its parameters and an optional adapter of the language model.

The parts of the parameters:
  vision      the image tower of captioning; `aligner` maps its features to the language model
  language    Llama: text embeddings, layers, text head
  generation  `embedding` of image tokens, its `aligner` to the language model, `head` to logits of image tokens
  vq          the image tokenizer
"""

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from uae_jax import trees
from uae_jax.models.janus import vq
from uae_jax.models.janus.config import JanusConfig
from uae_jax.models.janus.vision import VisionTower
from uae_jax.models.language.model import Params, Prefix, embed_prompt, prefix_of, text_positions
from uae_jax.models.language.text import Embedding, Head, LanguageModel
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.mlp import MLP


class ImageHead(nn.Module):
    """Linear, GELU with the error function, linear: hidden states to logits of image tokens."""

    hidden: int
    codes: int

    @nn.compact
    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Float32 logits."""
        inner = nn.gelu(Dense(self.hidden, name="first")(x), approximate=False)
        return Head(self.codes, use_bias=True, name="second")(inner)


class Generation(nn.Module):
    """What drawing adds to the language model: how image tokens are read, and how they are scored.

    The table is its own, apart from the codebook of the tokenizer.
    """

    config: JanusConfig

    def setup(self):
        width, image = self.config.text.width, self.config.vq
        self.embedding = Embedding(image.codes, image.code_width)
        self.aligner = MLP(width, width)
        self.head = ImageHead(width, image.codes)

    def embed(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """What the language model reads for image tokens, in the config's precision."""
        return self.aligner(self.embedding(tokens).astype(self.config.text.dtype))

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Float32 logits of image tokens."""
        return self.head(hidden)

    def __call__(self, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows v"]:
        """Touches every parameter, for `init`."""
        return self.logits(self.embed(tokens))


def init_params(config: JanusConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters, float32."""
    keys = {name: trees.name_key(key, name) for name in ("vision", "aligner", "language", "generation", "vq")}
    vision, ids = config.vision, jnp.zeros((1, 2), jnp.int32)
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, vision.num_channels))
    features = jnp.zeros((1, vision.hidden_size))
    language = LanguageModel(config.text).init(keys["language"], ids, method="initialise")
    return {
        "vision": VisionTower(vision).init(keys["vision"], pixels)["params"],
        "aligner": MLP(config.text.width, config.text.width).init(keys["aligner"], features)["params"],
        "language": language["params"],
        "generation": Generation(config).init(keys["generation"], ids)["params"],
        "vq": vq.init_params(config.vq, keys["vq"]),
    }


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: JanusConfig) -> dict[str, Any]:
    """Shapes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def encode_images(
    config: JanusConfig, params: Params, pixels: Float[Array, "b height width c"]
) -> Float[Array, "b p d"]:
    """Embeddings of images for captioning.

    Args:
      config: sizes.
      params: parameters.
      pixels: in [-1, 1], of `config.vision.image_size`.
    """
    tower, width = VisionTower(config.vision), config.text.width
    features = tower.apply({"params": params["vision"]}, pixels.astype(config.text.dtype))
    return constrain(cast(Array, MLP(width, width).apply({"params": params["aligner"]}, features)), "batch")


def prompt_prefix(
    config: JanusConfig,
    params: Params,
    adapter: Params | None,
    batch: Mapping[str, Array],
    image_embeds: Float[Array, "b p d"] | None = None,
) -> Prefix:
    """Runs caption prompts once; samples and scores of all their completions start here.

    Args:
      config, params: of the model.
      adapter: of the language model; None is the reference model.
      batch: `prompt_ids` `[B, T]`, right-padded, and `prompt_mask`; also `pixels` of `encode_images`, unless
        `image_embeds` is given or the prompt is text alone.
      image_embeds: of `encode_images`, where policy and reference share them.

    Returns:
      The prefix of the B prompts; gradients flow through it.
    """
    if image_embeds is None and "pixels" in batch:
        image_embeds = encode_images(config, params, batch["pixels"])
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    return text_prefix(config, params, adapter, embed_prompt(config, params, ids, mask, image_embeds), mask)


def text_prefix(
    config: JanusConfig, params: Params, adapter: Params | None, embeds: Float[Array, "b t d"], mask: Array
) -> Prefix:
    """`language.model.prefix_of` with positions that count the tokens of each row."""
    positions = text_positions(jnp.zeros(1, jnp.int32), mask.shape[1])  # the same for all rows
    return prefix_of(config, params, adapter, embeds, positions, mask, jnp.sum(mask, axis=1, dtype=jnp.int32))


def embed_image_tokens(config: JanusConfig, params: Params, tokens: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
    """What the language model reads for image tokens."""
    return _generation(config, params, tokens, "embed")


def image_logits(config: JanusConfig, params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
    """Float32 logits of image tokens, without guidance, of final hidden states."""
    return _generation(config, params, hidden, "logits")


def _generation(config: JanusConfig, params: Params, x: Array, method: str) -> Array:
    return cast(Array, Generation(config).apply({"params": params["generation"]}, x, method=method))
