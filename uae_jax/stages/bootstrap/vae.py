"""Phase 1 of the bootstrap: an auto-encoder of scenes, and the scale of its latents (arXiv 2112.10752, section 3.1)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.methods.method import Supervised
from uae_jax.models.autoencoder.blocks import sample_latents
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.stages.bootstrap import scene_stream
from uae_jax.stages.bootstrap.scene_stream import World

# small against the squared error of a good image (1e-3), large enough to keep the latents smooth
KL_WEIGHT = 3e-4


def stream(world: World, *, seed: int, batch_size: int, side: int):
    """Batches of `pixels` `[B, S, S, 3]` in [-1, 1]."""
    return scene_stream.stream(
        lambda index: {"pixels": scene_stream.pixels_of(world, world.scene_at("train", index, seed), side)}, batch_size
    )


def algorithm(config: VAEConfig) -> Supervised:
    """Squared and absolute reconstruction error plus a weak KL divergence to the unit Gaussian, on batches of `pixels`
    `[B, H, W, 3]`.
    """

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen
        pixels = rollout["samples"]["pixels"]
        mean, log_variance = vae.encode(config, params, pixels)
        decoded = vae.decode(config, params, sample_latents(key, mean, log_variance))
        squared = jnp.mean(jnp.square(decoded - pixels), (1, 2, 3))
        absolute = jnp.mean(jnp.abs(decoded - pixels), (1, 2, 3))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance, (1, 2, 3))
        count = jnp.float32(pixels.shape[0])
        total = jnp.sum(squared + 0.2 * absolute + KL_WEIGHT * kl)
        return total, count, {"squared_error": (squared.sum(), count), "kl": (kl.sum(), count)}

    return Supervised(loss)


def fit_latent_scale(config: VAEConfig, params: dict, pixels: Array) -> VAEConfig:
    """The configuration whose model latents have mean 0 and standard deviation 1 on these images `[B, H, W, 3]`."""
    mean, _ = jax.jit(vae.encode, static_argnums=0)(config, params, pixels)
    return dataclasses.replace(config, shift_factor=float(jnp.mean(mean)), scaling_factor=float(1 / jnp.std(mean)))
