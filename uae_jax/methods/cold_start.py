"""Cold start: 1 - similarity of image and reconstruction, differentiated through sampler and auto-encoder.

Source: arXiv 2509.09666, section 3, and the released code (10 Euler steps, guidance 5). Departures:

1. The released code conditions on the caption's own states, which attend to the image; `condition="caption_states"`
   does the same. The default encodes the caption again without the image, as inference does: nothing passes the text
   bottleneck.
2. `gradient_steps` may restrict the gradient to the last steps (DRaFT-K, arXiv 2309.17400); the default is all of them.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uae_jax import trees
from uae_jax.diffusion.sampler import sample
from uae_jax.methods.method import Described, Loss
from uae_jax.methods.stage_settings import SamplerConfig, SupervisedSettings, denoising
from uae_jax.models import uae
from uae_jax.rewards.similarity import CLAMPS, RewardConfig, chosen_encoders, mixed_reward
from uae_jax.rollouts.captioning import CAPTION_FIELDS, IMAGE_FIELDS, PROMPT_FIELDS
from uae_jax.rollouts.frozen_inputs import STATE_FIELDS, stored_context
from uae_jax.rollouts.reconstruction import Denoising, caption_context, decode, predictor, sample_keys
from uae_jax.settings import changed, setting
from uae_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class ColdStartConfig(SupervisedSettings):
    """Settings of the cold start."""

    steps: int = changed(SupervisedSettings, "steps", 500)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, warmup_steps=20)
    sampler_steps: int = setting(10, "denoising steps that are differentiated", low=1, source="released UAE code")
    guidance_scale: float = setting(5.0, "1 is without guidance", low=0, source="released UAE code")
    gradient_steps: int = setting(0, "only the last so many steps are differentiated; 0 for all", low=0)
    condition: str = setting(
        "reference",
        "what the decoder reads: the caption encoded alone, or its own states after the image as in the released code",
        choices=("reference", "caption_states"),
    )
    clamp: str = setting(
        "straight_through",
        "how images are clipped to their range before the encoder, see rewards.similarity.clamp_image",
        choices=CLAMPS,
    )
    vae_chunk: int = setting(0, "images decoded at once; 0 for all; memory, not results", low=0, free=True)
    reward: RewardConfig = RewardConfig()

    def problems(self) -> Iterator[str]:
        """Raises nothing; a term of the reward that needs sampled captions is a mistake."""
        yield from super().problems()
        yield from self.reward.caption_terms("cold_start")


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = ColdStartConfig
    reinforcement: ClassVar[bool] = False
    kl_bound: ClassVar[str] = "kl"

    settings: ColdStartConfig
    sampler: SamplerConfig
    system: Described

    @staticmethod
    def trains(settings: ColdStartConfig) -> tuple[str, ...]:
        """Projector and transformer."""
        return ("projector", "transformer")

    @staticmethod
    def needs_captions(settings: ColdStartConfig) -> bool:
        """Yes: they are what images are rebuilt from."""
        return True

    @staticmethod
    def reads(settings: ColdStartConfig) -> tuple[str, ...]:
        """Images and captions, and what the captioner sees where its states after the image are the condition."""
        seen = (*IMAGE_FIELDS, *PROMPT_FIELDS) if settings.condition == "caption_states" else ()
        return ("pixels", *CAPTION_FIELDS, *seen)

    @staticmethod
    def precomputable(settings: ColdStartConfig) -> dict[str, tuple[str, ...]]:
        """States, where the caption is encoded alone; the images themselves are compared with."""
        return {"states": CAPTION_FIELDS} if settings.condition == "reference" else {}

    @property
    def denoising(self) -> Denoising:
        """The sampler that is differentiated."""
        settings = self.settings
        return denoising(
            self.system.model,
            self.sampler,
            settings.sampler_steps,
            settings.guidance_scale,
            condition=settings.condition,
            vae_chunk=settings.vae_chunk,
        )

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """The batch itself: nothing is sampled."""
        return {"samples": batch}

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """One minus the similarity of each image and its reconstruction."""
        parts, batch, model, how = {**frozen, **params}, rollout["samples"], self.system.model, self.denoising
        if STATE_FIELDS[0] in batch:
            positive, negative = stored_context(model, parts, batch, guided=how.guidance_scale != 1)
        else:
            tokens, mask = batch["caption_ids"], batch["caption_mask"]
            lengths = jnp.sum(mask, -1, dtype=jnp.int32) - 1
            positive, negative = caption_context(model, parts, how, batch, tokens, mask, lengths, policy=False)
        noise = uae.initial_noise(model, sample_keys(trees.name_key(key, "noise"), batch["sample_id"]))
        predict = predictor(model, parts, how, positive, negative, policy=False)
        steps = self.settings.gradient_steps or None
        latents = sample(predict, noise, jnp.asarray(how.sigmas), remat=True, gradient_steps=steps)
        pixels = decode(model, parts, how, latents)
        reward = dataclasses.replace(self.settings.reward, clamp=self.settings.clamp)
        encoders = chosen_encoders(reward, self.system.encoders)
        if model.transformer.remat != "none":  # no other stage differentiates the encoders
            encoders = tuple(dataclasses.replace(encoder, remat=True) for encoder in encoders)
        score, _ = mixed_reward(reward, encoders, parts["encoders"], batch["pixels"], pixels, 1)
        count = jnp.float32(len(score))
        return jnp.sum(1 - score), count, {"reward": (jnp.sum(jax.lax.stop_gradient(score)), count)}
