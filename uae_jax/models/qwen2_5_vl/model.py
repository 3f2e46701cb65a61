"""Pure functions of Qwen2.5-VL over `params = {"vision", "language"}` and an optional adapter of the language model."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from uae_jax import trees
from uae_jax.models.language.model import Params, Prefix, embed_prompt, prefix_of
from uae_jax.models.language.text import LanguageModel
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.qwen2_5_vl.vision import VisionTower
from uae_jax.nn.constrain import constrain
from uae_jax.nn.mlp import MLP


def init_params(config: Qwen2_5VLConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters `{"vision", "language"}`, float32."""
    vision, ids = config.vision, jnp.zeros((1, 2), jnp.int32)
    patches = config.vision.merge_size**2
    groups = jnp.zeros((1, patches), jnp.int32)
    vision_inputs = (jnp.zeros((1, patches, vision.patch_width)), jnp.zeros((1, patches, 2), jnp.int32), groups, groups)
    language = LanguageModel(config.text).init(trees.name_key(key, "language"), ids, method="initialise")
    return {
        "vision": VisionTower(vision).init(trees.name_key(key, "vision"), *vision_inputs)["params"],
        "language": language["params"],
    }


@functools.lru_cache(maxsize=32)  # tracing is most of the time of reading a small model
def abstract_params(config: Qwen2_5VLConfig) -> dict[str, Any]:
    """Shapes of `init_params`, without computing anything."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def encode_images(
    config: Qwen2_5VLConfig,
    params: Params,
    patches: Float[Array, "b p pixels"],
    positions: Int[Array, "b p 2"],
    windows: Int[Array, "b p"],
    images: Int[Array, "b p"],
) -> Float[Array, "b merged d"]:
    """Image embeddings of the patches of each row; see `vision.VisionTower` for the arguments."""
    tower = VisionTower(config.vision)
    return cast(Array, tower.apply({"params": params["vision"]}, patches, positions, windows, images))


def prompt_prefix(
    config: Qwen2_5VLConfig,
    params: Params,
    adapter: Params | None,
    batch: Mapping[str, Array],
    image_embeds: Float[Array, "b merged d"] | None = None,
) -> Prefix:
    """Runs the caption prompts once, for sampling and scoring any number of completions.

    Args:
      config: sizes.
      params: parameters.
      adapter: adapter of the language model, or None for the reference model.
      batch: `prompt_ids`, `prompt_mask`, `prompt_positions`, `prompt_next`; also `patches`, `patch_positions`,
        `patch_windows`, `patch_images` unless `image_embeds` is given or the prompt is text alone.
      image_embeds: result of `encode_images`, to share it between policy and reference.

    Returns:
      The prefix of the B prompts; gradients flow through it.
    """
    if image_embeds is None and "patches" in batch:
        names = ("patches", "patch_positions", "patch_windows", "patch_images")
        image_embeds = encode_images(config, params, *(batch[name] for name in names))
    embeds = embed_prompt(config, params, batch["prompt_ids"], batch["prompt_mask"], image_embeds)
    return prefix_of(
        config, params, adapter, embeds, batch["prompt_positions"], batch["prompt_mask"], batch["prompt_next"]
    )


def init_projector(key: Key[Array, ""], width: int, hidden: int, features: int) -> dict[str, Any]:
    """Random parameters of a projector, language width to the width of the decoder's context (arXiv 2509.09666,
    section 3).
    """
    return dict(MLP(hidden, features).init(key, jnp.zeros((1, width)))["params"])


def project(projector_params: Params, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows d_context"]:
    """Applies the projector, whose sizes are those of its parameters."""
    sizes = (projector_params[name]["kernel"].shape[-1] for name in ("first", "second"))
    return constrain(cast(Array, MLP(*sizes).apply({"params": projector_params}, hidden)), "batch")
