"""The control of und_for_gen: flow matching of the images on the captions that the captioner writes, without rewards.

The decoder sees the captions that it would draw under a reward, and the images themselves as targets. What a method
with rewards gains over this control is not owed to more steps on these captions. Source of the loss: arXiv 2403.03206,
section 2. No caption is dropped.

Shape letters: B images, `h w C` latents.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.methods.method import Loss
from uae_jax.methods.und_for_gen import DecoderMethod, DecoderMethodSettings
from uae_jax.models import uae
from uae_jax.models.autoencoder.blocks import sample_latents
from uae_jax.nn.constrain import constrain_rows
from uae_jax.rollouts.frozen_inputs import image_moments
from uae_jax.rollouts.reconstruction import sample_keys
from uae_jax.settings import setting


@dataclasses.dataclass(frozen=True)
class CaptionMatchingConfig(DecoderMethodSettings):
    """Settings of the control."""

    time_scheme: str = setting("logit_normal", "density of the noise levels", choices=flow.SCHEMES)
    time_shift: float = setting(3.0, "shift of these noise levels", above=0)

    def rows_of(self, group_size: int) -> int:
        """An image is its only sample."""
        return 1


@dataclasses.dataclass(frozen=True)
class CaptionMatching(DecoderMethod):
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = CaptionMatchingConfig

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Captions of the images, encoded, and the images' latents.

        Args:
          params: trained parts of the model; frozen: the other parts.
          batch: B images with prompts (`data.loader`).
          key: of this step.

        Returns:
          `samples` with leading axis B, and `metrics` of the captions.
        """
        parts, model = jax.lax.stop_gradient({**frozen, **params}), self.system.model
        context, _, metrics = self.contexts(parts, batch, key)
        keys = sample_keys(trees.name_key(key, "latents"), batch["sample_id"])
        drawn = jax.vmap(sample_latents)(keys, *image_moments(model, parts, batch["pixels"]))
        samples = {"latents": model.decoder.to_model_latents(parts, drawn), "sample_id": batch["sample_id"]}
        samples |= {"context": context[0], "context_mask": context[1]}
        return {"samples": constrain_rows(samples), "metrics": metrics}

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """The squared error of the predicted velocity at one random noise level an image."""
        samples, model, own = constrain_rows(rollout["samples"]), self.system.model, self.own
        keys = sample_keys(key, samples["sample_id"])
        named = {name: jax.vmap(lambda k: trees.name_key(k, name))(keys) for name in ("sigma", "noise")}
        sigma = flow.sample_sigmas(named["sigma"], own.time_scheme, own.time_shift)
        noise = uae.initial_noise(model, named["noise"])
        noisy, context = flow.corrupt(samples["latents"], noise, sigma), (samples["context"], samples["context_mask"])
        predicted = uae.velocity(model, {**frozen, **params}, noisy, sigma, context, policy=True)
        target = flow.velocity_target(samples["latents"], noise)
        losses = flow.flow_matching_loss(predicted, target, jnp.ones_like(sigma))
        return jnp.sum(losses), jnp.float32(len(losses)), {}
