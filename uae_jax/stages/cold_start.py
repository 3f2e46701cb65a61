"""Cold start: 1 - similarity of drawing and picture, differentiated through sampler and VAE (arXiv 2509.09666, section
3).

The official code conditions on the answer's hidden states, which attend to the image; `condition="answer_states"` does
the same. The default encodes the caption again without the image, as inference does, so that nothing passes the text
bottleneck.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from uae_jax import trees
from uae_jax.diffusion.sampler import sample
from uae_jax.models import condition, uae
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.rl.reconstruction import Context, Denoising, decode, encode_condition, predictor, sample_keys
from uae_jax.rl.rewards import Encoder, RewardConfig, mixed_reward
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import Algorithm, make_train_step, supervised

CONDITIONS = ("reencoded_caption", "answer_states")


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Settings of the stage.

    Attributes:
      steps, batch_size: train steps, and pictures in each.
      micro_batches, updates_per_rollout: see `training.step`.
      sampler_steps, guidance_scale: of the differentiated sampler.
      gradient_steps: only the last so many steps are differentiated (DRaFT-K); 0 for all.
      condition: `reencoded_caption` or `answer_states`.
      clamp: how drawings are cut to the image range before the encoder, see `rewards.clamp_image`.
      vae_chunk: pictures decoded at once; 0 for all.
      reward: the similarity.
      optimizer: see `training.optimizer`.
      ema_decay: ceiling of the moving average, which replaces the weights at the end; 0 for none.

    Raises:
      ValueError: an unknown condition, or a reward of captions.
    """

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    micro_batches: int = 1
    updates_per_rollout: int = 1
    sampler_steps: int = 10
    guidance_scale: float = 5.0
    gradient_steps: int = 0
    condition: str = "reencoded_caption"
    clamp: str = "straight_through"
    vae_chunk: int = 0
    reward: RewardConfig = RewardConfig()
    ema_decay: float = 0.0

    def __post_init__(self):
        if self.condition not in CONDITIONS:
            raise ValueError(f"cold_start.condition is {self.condition!r}; choose one of {', '.join(CONDITIONS)}")
        self.reward.check_drawings_alone("cold_start")


def trainable(parts: Mapping, config: ColdStartConfig, key: Array) -> dict:
    """The parts of the model that this stage changes."""
    del config, key
    return {name: parts[name] for name in ("projector", "transformer")}


def answer_context(model: uae.UAE, parts: Mapping, how: Denoising, batch: Mapping) -> tuple[Context, Context | None]:
    """Projected hidden states of the caption's tokens after prompt and image, padded to the negative prompt's
    length.
    """
    params, adapter = uae.captioner_weights(parts, policy=how.policy_condition)
    prefix = qwen.prompt_prefix(model.captioner, params, adapter, batch)
    tokens, mask = batch["caption_ids"], batch["caption_mask"]
    embeds = qwen.embed_tokens(model.captioner, params, tokens)
    positions = qwen.text_positions(prefix.next_position, tokens.shape[1])
    hidden = qwen.hidden_states(model.captioner, params, adapter, embeds, positions, mask, (prefix.memory,))
    room = ((0, 0), (0, model.template.length(tokens.shape[1]) - tokens.shape[1]))
    positive = jnp.pad(qwen.project(parts["projector"], hidden), (*room, (0, 0))), jnp.pad(mask, room)
    negative = None
    if how.guidance_scale != 1:
        negative = condition.encode_negative(model.captioner, params, adapter, model.template, tokens.shape[1])
    return positive, negative


def algorithm(
    model: uae.UAE, config: ColdStartConfig, denoising: Denoising, encoders: tuple[Encoder, ...]
) -> Algorithm:
    """The semantic reconstruction loss of captioned pictures; encoders are recomputed where the transformer is."""
    reward = dataclasses.replace(config.reward, clamp=config.clamp)
    if model.transformer.remat != "none":  # no other stage differentiates the encoders
        encoders = tuple(dataclasses.replace(encoder, remat=True) for encoder in encoders)

    def loss(params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> tuple[Array, Array, dict]:
        parts, batch = {**frozen, **params}, rollout["samples"]
        if config.condition == "answer_states":
            positive, negative = answer_context(model, parts, denoising, batch)
        else:
            lengths = jnp.sum(batch["caption_mask"], -1, dtype=jnp.int32) - 1
            positive, negative = encode_condition(model, parts, denoising, batch["caption_ids"], lengths)
        noise = uae.initial_noise(model, sample_keys(trees.name_key(key, "noise"), batch["sample_id"]))
        predict = predictor(model, parts, denoising, positive, negative, policy=False)
        latents = sample(
            predict, noise, jnp.asarray(denoising.sigmas), remat=True, gradient_steps=config.gradient_steps or None
        )
        pixels = decode(model, parts, denoising, latents)
        score, _ = mixed_reward(reward, encoders, parts["encoders"], batch["pixels"], pixels, 1)
        count = jnp.float32(len(score))
        return jnp.sum(1 - score), count, {"reward": (jnp.sum(jax.lax.stop_gradient(score)), count)}

    return supervised(loss)


def make_step(
    model: uae.UAE,
    config: ColdStartConfig,
    denoising: Denoising,
    encoders: tuple[Encoder, ...],
    optimizer: optax.GradientTransformation,
    shardings=None,
):
    """The compiled `train_step(state, frozen, batch, key)` of this stage."""
    step = make_train_step(
        algorithm(model, config, denoising, encoders),
        optimizer,
        updates_per_rollout=config.updates_per_rollout,
        micro_batches=config.micro_batches,
        ema_decay=config.ema_decay or None,
    )
    return jax.jit(step, donate_argnames="state", out_shardings=shardings)
