"""CLIP's image and text towers (arXiv 2103.00020), as in transformers' CLIPModel; also those of Long-CLIP."""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from uae_jax import trees
from uae_jax.models.encoders.blocks import TransformerBlock, image_patches
from uae_jax.models.encoders.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, LongCLIPTextConfig
from uae_jax.nn.attention import Mask
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.norms import LayerNorm

LEGACY_EOS = 2  # published configs with this wrong id mean "pool where the id is largest"

AnyCLIPConfig = CLIPConfig | CLIPVisionConfig | CLIPTextConfig


class VisionTower(nn.Module):
    """The image tower: class token and patches, projection of the class token (arXiv 2103.00020, section 2.4)."""

    config: CLIPVisionConfig
    remat: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "b height width c"]) -> Float[Array, "b d_out"]:
        """Features, not normalised, of normalised images of the config's size.

        Raises:
          ValueError: the images have another size than the config's `image_size`.
        """
        config, width = self.config, self.config.hidden_size
        size = (config.image_size, config.image_size, config.num_channels)
        if pixels.shape[1:] != size:
            raise ValueError(f"CLIP takes images of shape {size}, not {pixels.shape[1:]}; preprocess them first")
        patches = Dense(width, use_bias=False, name="patch_embedding")(image_patches(pixels, config.patch_size))
        first = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,), jnp.float32)
        table = self.param("position_embedding", nn.initializers.normal(0.02), (config.grid**2 + 1, width), jnp.float32)
        first = jnp.broadcast_to(first.astype(patches.dtype), (len(patches), 1, width))
        x = jnp.concatenate([first, patches], axis=1) + table.astype(patches.dtype)
        x = LayerNorm(config.layer_norm_eps, name="pre_norm")(x)
        x, _ = scan_layers(TransformerBlock, config.num_hidden_layers, "full" if self.remat else "none")(
            config, name="layers"
        )(x, Mask())
        x = LayerNorm(config.layer_norm_eps, name="post_norm")(x[:, 0])
        return Dense(config.projection_dim, use_bias=False, name="projection")(x)


class TextTower(nn.Module):
    """The causal text tower, pooled at the end token (arXiv 2103.00020, section 2.4)."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b d_out"]:
        """Features, not normalised, of at most `max_position_embeddings` tokens.

        Padding after the end token changes nothing, because attention is causal.

        Raises:
          ValueError: more tokens than positions.
        """
        config, width, length = self.config, self.config.hidden_size, ids.shape[1]
        if length > config.max_position_embeddings:
            raise ValueError(
                f"CLIP takes at most {config.max_position_embeddings} tokens, not {length}; shorten the text"
            )
        normal = nn.initializers.normal(0.02)
        tokens = self.param("token_embedding", normal, (config.vocab_size, width), jnp.float32)
        table = self.param("position_embedding", normal, (config.max_position_embeddings, width), jnp.float32)
        if isinstance(config, LongCLIPTextConfig):
            table = long_positions(
                config, table, self.param("position_embedding_res", normal, table.shape, jnp.float32)
            )
        x = (tokens[ids] + table[:length]).astype(jnp.float32)
        x, _ = scan_layers(TransformerBlock, config.num_hidden_layers)(config, name="layers")(x, Mask(causal=True))
        x = LayerNorm(config.layer_norm_eps, name="final_norm")(x)
        pooled = x[jnp.arange(len(x)), pooling_position(config, ids)]
        return Dense(config.projection_dim, use_bias=False, name="projection")(pooled)


def long_positions(
    config: LongCLIPTextConfig, first: Float[Array | np.ndarray, "t d"], second: Float[Array | np.ndarray, "t d"]
) -> Float[Array, "t d"]:
    """The first `kept_positions` of one table, the others of a second one (arXiv 2403.15378, section 3.1)."""
    return jnp.concatenate([first[: config.kept_positions], second[config.kept_positions :]])


def as_plain(config: AnyCLIPConfig, params: trees.Tree) -> tuple[AnyCLIPConfig, dict[str, Any]]:
    """Long-CLIP as a CLIPModel with one table of positions and the same features; other models as they are."""
    if not isinstance(config, CLIPConfig) or not isinstance(config.text, LongCLIPTextConfig):
        return config, params
    text = dict(params["text"])
    text["position_embedding"] = long_positions(
        config.text, text["position_embedding"], text.pop("position_embedding_res")
    )
    fields = {field.name: getattr(config.text, field.name) for field in dataclasses.fields(CLIPTextConfig)}
    return dataclasses.replace(config, text=CLIPTextConfig(**fields)), {**params, "text": text}


def pooling_position(config: CLIPTextConfig, ids: Int[Array, "b t"]) -> Int[Array, " b"]:
    """Where the text feature is read: the first end token, or the largest id for published configs with end id 2.

    0 where a text has no end token (as in transformers).
    """
    marks = ids if config.eos_token_id == LEGACY_EOS else (ids == config.eos_token_id).astype(jnp.int32)
    return jnp.argmax(marks, axis=-1)


def image_features(
    config: CLIPConfig | CLIPVisionConfig,
    params: trees.Tree,
    pixels: Float[Array, "b height width c"],
    *,
    remat: bool = False,
) -> Float[Array, "b d_out"]:
    """Projected image features, not normalised, in the precision of `pixels`.

    Args:
      config: of both towers or of the image tower.
      params: tree with `vision`.
      pixels: already preprocessed.
      remat: recompute layers in the backward pass.
    """
    vision = config.vision if isinstance(config, CLIPConfig) else config
    return cast(Array, VisionTower(vision, remat).apply({"params": params["vision"]}, pixels))


def text_features(
    config: CLIPConfig | CLIPTextConfig, params: trees.Tree, ids: Int[Array, "b t"]
) -> Float[Array, "b d_out"]:
    """Projected text features, not normalised, in float32.

    Args:
      config: of both towers or of the text tower.
      params: tree with `text`.
      ids: of tokens; whatever follows the end token is ignored.
    """
    text = config.text if isinstance(config, CLIPConfig) else config
    return cast(Array, TextTower(text).apply({"params": params["text"]}, ids))


def init_params(config: AnyCLIPConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """New random parameters, float32.

    Args:
      config: of both towers, or of one.
      key: random key.

    Returns:
      A tree with `vision`, `text` and `logit_scale` (a scalar), or with the one tower of the config.
    """
    vision = config.vision if isinstance(config, CLIPConfig) else config
    text = config.text if isinstance(config, CLIPConfig) else config
    params: dict[str, Any] = {}
    if isinstance(vision, CLIPVisionConfig):
        blank = jnp.zeros((1, vision.image_size, vision.image_size, vision.num_channels))
        params["vision"] = VisionTower(vision).init(trees.name_key(key, "vision"), blank)["params"]
    if isinstance(text, CLIPTextConfig):
        ids = jnp.zeros((1, 2), jnp.int32)
        params["text"] = TextTower(text).init(trees.name_key(key, "text"), ids)["params"]
    if isinstance(config, CLIPConfig):
        params["logit_scale"] = jnp.asarray(config.logit_scale_init_value, jnp.float32)
    return params


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: AnyCLIPConfig) -> dict[str, Any]:
    """The shapes of `init_params`, without allocating anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
