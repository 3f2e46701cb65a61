"""Captions and drawings of one network: what Janus writes about images, and what it draws of texts.

Shape letters: b images or texts, n captions or drawings, t tokens of a prompt, c image tokens, `H W` image size.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from uae_jax import trees
from uae_jax.models.janus import drawing, model, vq
from uae_jax.models.janus.config import JanusConfig
from uae_jax.models.janus.drawing import Drawing
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.rollouts.captioning import complete_prompts, for_decoding
from uae_jax.rollouts.reconstruction import sample_keys
from uae_jax.sharding import gather_over_fsdp
from uae_jax.trees import Tree


@dataclasses.dataclass(frozen=True)
class DrawingConfig:
    """How images are drawn.

    Attributes:
      guidance_scale: of classifier-free guidance; 1 skips the unconditional half.
      sampling: temperature and truncation of image tokens.
      vq_chunk: images decoded at once; 0 for all.
    """

    guidance_scale: float = 5.0
    sampling: SamplingConfig = SamplingConfig()
    vq_chunk: int = 0


def weights(parts: Mapping[str, Tree], *, policy: bool) -> tuple[dict[str, Tree], Tree | None]:
    """Parameters of `janus.model`, and the adapter of the language model.

    Args:
      parts: the parts of `janus.model`, `language_lora` where there is an adapter, and `language_policy` where the
        language model is fine-tuned fully.
      policy: the trained model, or the reference (adapter off).
    """
    params = {name: parts[name] for name in ("vision", "aligner", "language", "generation", "vq")}
    if not policy:
        return params, None
    if "language_policy" in parts:
        return params | {"language": parts["language_policy"]}, None
    return params, parts.get("language_lora")


def sample_captions(
    config: JanusConfig,
    parts: Mapping[str, Tree],
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    image_embeds: Float[Array, "b p d"] | None = None,
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    group: int = 1,
    gather_weights: bool = False,
) -> Completion:
    """`captioning.sample_captions` of this network.

    Args:
      config: sizes.
      parts: see `weights`.
      batch: b images with prompts (`janus.model.prompt_prefix`) and `sample_id`.
      key: of the step.
      image_embeds: of `janus.model.encode_images`, to share them; None computes them.
      max_new_tokens: longest caption.
      sampling, group, gather_weights: as there.
    """
    return complete_prompts(
        config,
        *weights(parts, policy=True),
        lambda params, adapter: model.prompt_prefix(config, params, adapter, batch, image_embeds),
        sample_keys(trees.name_key(key, "caption"), batch["sample_id"], group),
        max_new_tokens=max_new_tokens,
        stops=config.stop_token_ids,
        sampling=sampling,
        group=group,
        gather_weights=gather_weights,
    )


def sample_drawings(
    config: JanusConfig,
    parts: Mapping[str, Tree],
    how: DrawingConfig,
    ids: Int[Array, "b t"],
    mask: Bool[Array, "b t"],
    sample_id: Int[Array, " b"],
    key: Key[Array, ""],
    *,
    group: int = 1,
    gather_weights: bool = False,
) -> Drawing:
    """Image tokens by the policy, n = b * group rows, those of a text together.

    Args:
      config: sizes.
      parts: see `weights`.
      how: guidance and sampling.
      ids, mask: right-padded prompts, which end with the token that begins an image.
      sample_id: global; decides the random keys.
      key: of the step.
      group: drawings of each text.
      gather_weights: see `captioning.for_decoding`.
    """
    params, adapter, packed = for_decoding(config, *weights(parts, policy=True), gather_weights)
    if gather_weights:  # the loop reads the embedding, aligner and head of image tokens too
        params |= {"generation": gather_over_fsdp(params["generation"], config.text.dtype)}
    prefix = drawing.drawing_prefix(config, params, adapter, ids, mask, guided=how.guidance_scale != 1)
    return drawing.draw(
        config,
        params,
        adapter,
        prefix,
        sample_keys(trees.name_key(key, "drawing"), sample_id, group),
        guidance_scale=how.guidance_scale,
        sampling=how.sampling,
        group=group,
        packed=packed,
    )


def pixels(
    config: JanusConfig, parts: Mapping[str, Tree], how: DrawingConfig, tokens: Int[Array, "n c"]
) -> Float[Array, "n H W 3"]:
    """Images of image tokens, in [-1, 1]."""
    return jnp.clip(vq.decode(config.vq, parts["vq"], tokens, how.vq_chunk or None), -1, 1)
