"""Pretraining on long captions: projector and transformer learn to generate images by flow matching.

Source: arXiv 2509.09666, section 3. The language model and the auto-encoder are frozen. Where the paper is silent:

1. The velocity target is noise - image, times are logit-normal(0, 1), and the weight is 1, as in UniWorld-V1's
   train_denoiser.py (arXiv 2506.03147).
2. A share of the captions is replaced by the negative prompt, so that guidance works.
3. A decoder that is more than a machine can train as a whole learns by an adapter (`train=lora`).
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.methods.method import Described, Loss, split_samples
from uae_jax.methods.stage_settings import RolloutSettings, SamplerConfig, SupervisedSettings
from uae_jax.models import uae
from uae_jax.models.autoencoder.blocks import sample_latents
from uae_jax.rollouts.captioning import CAPTION_FIELDS
from uae_jax.rollouts.frozen_inputs import LATENT_FIELDS, STATE_FIELDS, image_moments, text_states, with_dropped
from uae_jax.rollouts.reconstruction import sample_keys
from uae_jax.settings import changed, setting
from uae_jax.training.optimizer import OptimizerConfig

INPUTS = ("pixels", *CAPTION_FIELDS, *LATENT_FIELDS, *STATE_FIELDS)


@dataclasses.dataclass(frozen=True)
class PretrainConfig(SupervisedSettings):
    """Settings of pretraining."""

    steps: int = changed(SupervisedSettings, "steps", 20_000)
    batch_size: int = changed(SupervisedSettings, "batch_size", 256)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, warmup_steps=500, schedule="cosine")
    condition_dropout: float = setting(
        0.1, "share of the captions that the negative prompt replaces, for guidance", low=0, high=1
    )
    time_scheme: str = setting(
        "logit_normal", "density of the noise levels", choices=flow.SCHEMES, source="arXiv 2506.03147"
    )
    time_shift: float = setting(3.0, "shift of the noise levels", above=0)
    weighting: str = setting("none", "weight of the loss by noise level", choices=flow.WEIGHTINGS)
    train_projector: bool = setting(True, "whether the projector learns too")
    train: str = setting(
        "full",
        "what is trained of the transformer: the whole, or an adapter; a later stage's KL is to what has no adapter",
        choices=("full", "lora"),
    )
    lora_rank: int = changed(RolloutSettings, "lora_rank", 32)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The method; a `methods.method.Method`."""

    Settings: ClassVar[type] = PretrainConfig
    reinforcement: ClassVar[bool] = False
    kl_bound: ClassVar[str] = "kl"

    settings: PretrainConfig
    sampler: SamplerConfig
    system: Described

    @staticmethod
    def trains(settings: PretrainConfig) -> tuple[str, ...]:
        """The transformer or its adapter, and the projector where the settings say so."""
        transformer = "transformer_lora" if settings.train == "lora" else "transformer"
        return ("projector", transformer) if settings.train_projector else (transformer,)

    @staticmethod
    def needs_captions(settings: PretrainConfig) -> bool:
        """Yes: they are what images are generated from."""
        return True

    @staticmethod
    def reads(settings: PretrainConfig) -> tuple[str, ...]:
        """Images and captions; the captioner sees texts alone."""
        return ("pixels", *CAPTION_FIELDS)

    @staticmethod
    def precomputable(settings: PretrainConfig) -> dict[str, tuple[str, ...]]:
        """Latents and states: what it makes of images and captions is frozen."""
        return {"latents": ("pixels",), "states": CAPTION_FIELDS}

    def rollout(self, params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        """Latents of the images and hidden states of the captions; the frozen encoders run here, without gradients.

        Where the batch has what these encoders make (`rollouts.frozen_inputs`), they do not run.
        """
        parts, model, settings = {**frozen, **params}, self.system.model, self.settings
        keys = sample_keys(key, batch["sample_id"])
        dropped = jax.vmap(lambda k: jax.random.bernoulli(trees.name_key(k, "drop"), settings.condition_dropout))(keys)

        def encode(inputs: Mapping) -> dict:
            if STATE_FIELDS[0] in inputs:
                hidden, mask = with_dropped(model, parts, inputs, inputs["dropped"])
            else:
                lengths = jnp.sum(inputs["caption_mask"], -1, dtype=jnp.int32) - 1
                kept = drop_captions(model, inputs["caption_ids"], lengths, inputs["dropped"])
                hidden, mask = text_states(model, parts, *kept)
            if LATENT_FIELDS[0] in inputs:
                mean, log_variance = (inputs[name] for name in LATENT_FIELDS)
            else:
                mean, log_variance = image_moments(model, parts, inputs["pixels"])
            drawn = jax.vmap(lambda k, m, v: sample_latents(trees.name_key(k, "latents"), m, v))(
                inputs["keys"], mean, log_variance
            )
            return {"latents": model.decoder.to_model_latents(parts, drawn), "hidden": hidden, "mask": mask}

        inputs = {name: batch[name] for name in INPUTS if name in batch} | {"keys": keys, "dropped": dropped}
        # the images of a batch at full resolution do not fit where only a part of its gradient does
        encoded = trees.map_parts(encode, split_samples(inputs, settings.micro_batches * settings.updates_per_rollout))
        return {"samples": encoded | {"sample_id": batch["sample_id"]}}

    def loss(self, params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> Loss:
        """Flow matching: the squared error of the predicted velocity at one random noise level an image."""
        parts, samples, model = {**frozen, **params}, rollout["samples"], self.system.model
        keys = sample_keys(key, samples["sample_id"])
        sigma = flow.sample_sigmas(_named(keys, "sigma"), self.settings.time_scheme, self.settings.time_shift)
        noise = uae.initial_noise(model, _named(keys, "noise"))
        context = model.decoder.context(parts, samples["hidden"], samples["mask"])
        noisy = flow.corrupt(samples["latents"], noise, sigma)
        predicted = uae.velocity(model, parts, noisy, sigma, context, policy=self.settings.train == "lora")
        weight = flow.loss_weight(sigma, self.settings.weighting)
        losses = flow.flow_matching_loss(predicted, flow.velocity_target(samples["latents"], noise), weight)
        return jnp.sum(losses), jnp.float32(len(losses)), {}


def drop_captions(
    model: uae.UAE, tokens: Int[Array, "b t"], lengths: Int[Array, " b"], dropped: Bool[Array, " b"]
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Puts the negative prompt in place of some captions.

    Args:
      model: for the negative prompt.
      tokens: int32 `[B, T]`; lengths: int32 `[B]`, without the stop token.
      dropped: bool `[B]`, which captions are replaced.
    """
    negative = jnp.asarray(model.template.negative, jnp.int32)[: tokens.shape[1]]
    row = jnp.zeros(tokens.shape[1], jnp.int32).at[: len(negative)].set(negative)
    return jnp.where(dropped[:, None], row, tokens), jnp.where(dropped, len(negative), lengths)


def _named(keys: Array, name: str) -> Array:
    return jax.vmap(lambda key: trees.name_key(key, name))(keys)
