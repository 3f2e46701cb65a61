"""Long-context pre-training: projector and transformer learn to draw captions by flow matching (arXiv 2509.09666,
section 3).

The language model and the auto-encoder are frozen. Velocity target noise - image, logit-normal times and weight 1, as
in UniWorld-V1's train_denoiser.py; the paper gives no more.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax import Array

from uae_jax import trees
from uae_jax.diffusion import flow
from uae_jax.models import condition, uae
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.sd3 import vae
from uae_jax.rl.reconstruction import sample_keys
from uae_jax.training.optimizer import OptimizerConfig
from uae_jax.training.step import Algorithm, make_train_step, split_samples


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of the stage.

    Attributes:
      steps, batch_size: train steps, and pictures in each.
      micro_batches: parts of a batch whose gradients are summed; the frozen encoders see one part of an update at a
        time too.
      updates_per_rollout: optimizer updates of one batch.
      condition_dropout: share of captions replaced by the negative prompt, for guidance.
      time_scheme, time_shift, weighting: see `diffusion.flow`.
      train_projector: whether the projector learns too.
      optimizer: see `training.optimizer`.
      ema_decay: ceiling of the moving average, which replaces the weights at the end; 0 for none.
    """

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    micro_batches: int = 1
    updates_per_rollout: int = 1
    condition_dropout: float = 0.1
    time_scheme: str = "logit_normal"
    time_shift: float = 3.0
    weighting: str = "none"
    train_projector: bool = True
    ema_decay: float = 0.0


def trainable(parts: Mapping, config: PretrainConfig, key: Array) -> dict:
    """The parts of the model that this stage changes."""
    del key
    names = ("projector", "transformer") if config.train_projector else ("transformer",)
    return {name: parts[name] for name in names}


def drop_captions(model: uae.UAE, tokens: Array, lengths: Array, dropped: Array) -> tuple[Array, Array]:
    """Puts the negative prompt in place of the captions where `dropped` `[B]` is true; tokens `[B, T]`, lengths
    `[B]`.
    """
    negative = jnp.asarray(model.template.negative, jnp.int32)[: tokens.shape[1]]
    row = jnp.zeros(tokens.shape[1], jnp.int32).at[: len(negative)].set(negative)
    return jnp.where(dropped[:, None], row, tokens), jnp.where(dropped, len(negative), lengths)


def algorithm(model: uae.UAE, config: PretrainConfig) -> Algorithm:
    """Flow matching of captioned pictures; the frozen encoders run in the rollout, without gradients."""

    def rollout(params: Mapping, frozen: Mapping, batch: Mapping, key: Array) -> dict:
        parts = {**frozen, **params}
        keys = sample_keys(key, batch["sample_id"])
        dropped = jax.vmap(lambda k: jax.random.bernoulli(trees.name_key(k, "drop"), config.condition_dropout))(keys)
        lengths = jnp.sum(batch["caption_mask"], -1, dtype=jnp.int32) - 1
        tokens, lengths = drop_captions(model, batch["caption_ids"], lengths, dropped)
        captioner, _ = uae.captioner_weights(parts, policy=False)

        def encode(inputs: Mapping) -> dict:
            ids, mask = condition.place_in_template(model.template, inputs["tokens"], inputs["lengths"])
            hidden = qwen.text_hidden_states(model.captioner, captioner, None, ids, mask)
            mean, log_variance = vae.encode(model.vae, parts["vae"], inputs["pixels"])
            drawn = jax.vmap(lambda k, m, v: vae.sample_latents(trees.name_key(k, "latents"), m, v))(
                inputs["keys"], mean, log_variance
            )
            return {"latents": vae.to_model_latents(model.vae, drawn), "hidden": hidden, "mask": mask}

        inputs = {"tokens": tokens, "lengths": lengths, "pixels": batch["pixels"], "keys": keys}
        # a batch's pictures at full resolution do not fit where only a part of its gradient does
        encoded = trees.map_parts(encode, split_samples(inputs, config.micro_batches * config.updates_per_rollout))
        return {"samples": encoded | {"sample_id": batch["sample_id"]}}

    def loss(params: Mapping, frozen: Mapping, rollout: Mapping, key: Array) -> tuple[Array, Array, dict]:
        parts, samples = {**frozen, **params}, rollout["samples"]
        keys = sample_keys(key, samples["sample_id"])
        sigma = flow.sample_sigmas(_named(keys, "sigma"), config.time_scheme, config.time_shift)
        noise = uae.initial_noise(model, _named(keys, "noise"))
        context = qwen.project(parts["projector"], samples["hidden"]), samples["mask"]
        predicted = uae.velocity(
            model, parts, flow.corrupt(samples["latents"], noise, sigma), sigma, context, policy=False
        )
        weight = flow.loss_weight(sigma, config.weighting)
        losses = flow.flow_matching_loss(predicted, flow.velocity_target(samples["latents"], noise), weight)
        return jnp.sum(losses), jnp.float32(len(losses)), {}

    return Algorithm(rollout, loss)


def _named(keys: Array, name: str) -> Array:
    return jax.vmap(lambda key: trees.name_key(key, name))(keys)


def make_step(model: uae.UAE, config: PretrainConfig, optimizer: optax.GradientTransformation, shardings=None):
    """The compiled `train_step(state, frozen, batch, key)` of this stage."""
    step = make_train_step(
        algorithm(model, config),
        optimizer,
        updates_per_rollout=config.updates_per_rollout,
        micro_batches=config.micro_batches,
        ema_decay=config.ema_decay or None,
    )
    return jax.jit(step, donate_argnames="state", out_shardings=shardings)
