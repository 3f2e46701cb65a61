"""Captions of a rollout: those of each part, or those of the whole batch before its parts (`rollout_slots`).

Shape letters: B images, G captions of an image, T caption tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from uae_jax.methods.method import Described
from uae_jax.methods.stage_settings import DecodedRollouts
from uae_jax.models.language.generate import Completion
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.rollouts.captioning import sample_captions

WRITTEN = "written"  # the field of a batch whose captions are there already


def write_captions(
    settings: DecodedRollouts,
    system: Described,
    parts: Mapping,
    batch: Mapping,
    key: Array,
    image_embeds: Float[Array, "b p d"] | None = None,
) -> Completion:
    """G captions of each image, rows of a group together: `[B * G, T]`; keys by global sample id.

    Args:
      settings, system: of the method.
      parts: the model.
      batch: B images with prompts (`data.loader`), or with the captions of `captions_first`.
      key: of the step.
      image_embeds: of `captioning.encode_batch_images`, to share them.
    """
    if WRITTEN in batch:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch[WRITTEN])
    return _sampled(settings, system, parts, batch, key, image_embeds)


def captions_first(
    settings: DecodedRollouts, system: Described, params: Mapping, frozen: Mapping, batch: Mapping, key: Array
) -> dict[str, Completion]:
    """The field of a batch with its captions, leaves `[B, G, ...]`, where a few slots write those of all parts."""
    if not settings.rollout_slots:
        return {}
    parts = jax.lax.stop_gradient({**frozen, **params})
    said = _sampled(settings, system, parts, batch, key, parts_of_prompts=settings.rollout_parts)
    group = settings.captions_per_image
    return {WRITTEN: jax.tree.map(lambda leaf: leaf.reshape(-1, group, *leaf.shape[1:]), said)}


def _sampled(
    settings: DecodedRollouts,
    system: Described,
    parts: Mapping,
    batch: Mapping,
    key: Array,
    image_embeds: Any = None,
    parts_of_prompts: int = 1,
) -> Completion:
    return sample_captions(
        system.model,
        parts,
        batch,
        key,
        image_embeds,
        max_new_tokens=settings.max_new_tokens,
        stops=system.stops,
        sampling=SamplingConfig(settings.temperature),
        group=settings.captions_per_image,
        gather_weights=settings.gather_weights,
        weights=settings.rollout_weights,
        ways=settings.rollout_ways,
        slots=settings.rollout_slots,
        parts_of_prompts=parts_of_prompts,
    )
