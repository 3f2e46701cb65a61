"""From captions to pictures: condition, guided denoising, VAE decoding. The decoder half of every stage and of
inference.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.diffusion.sampler import guided_velocity, sample
from uae_jax.models import condition, uae
from uae_jax.models.sd3 import vae

Context = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How pictures are sampled.

    Attributes:
      sigmas: noise levels from 1 to 0, N + 1 numbers (`diffusion.schedule`).
      guidance_scale: 1 skips the negative prompt.
      policy_condition: encode captions with the trained captioner, as the release does, instead of the reference.
      vae_chunk: pictures decoded at once; 0 for all.
    """

    sigmas: tuple[float, ...]
    guidance_scale: float = 1.0
    policy_condition: bool = False
    vae_chunk: int = 0


def encode_condition(
    model: uae.UAE, parts: Mapping, how: Denoising, tokens: Array, lengths: Array
) -> tuple[Context, Context | None]:
    """Context of captions and, where guidance is used, of the negative prompt.

    Args:
      model, parts: the model.
      how: guidance and which language model encodes.
      tokens: int32 `[N, T]`, right-padded.
      lengths: int32 `[N]`, tokens without the stop token.

    Returns:
      (`[N, S, Dc]`, mask `[N, S]`) and (`[1, S, Dc]`, mask `[1, S]`) or None.
    """
    params, adapter = uae.captioner_weights(parts, policy=how.policy_condition)
    positive = condition.encode_captions(model.captioner, params, adapter, model.template, tokens, lengths)
    negative = None
    if how.guidance_scale != 1:
        negative = condition.encode_negative(model.captioner, params, adapter, model.template, tokens.shape[1])
    return positive, negative


def predictor(
    model: uae.UAE,
    parts: Mapping,
    how: Denoising,
    positive: Context,
    negative: Context | None,
    *,
    policy: bool = True,
    stop_negative_gradient: bool = False,
) -> Callable[[Array, Array], Array]:
    """`predict(latents [N, h, w, C], sigma []) -> velocity [N, h, w, C]` for the sampling loops."""

    def predict(latents: Array, sigma: Array) -> Array:
        return guided_velocity(
            lambda x, s, context: uae.velocity(model, parts, x, s, context, policy=policy),
            latents,
            sigma,
            positive,
            negative,
            how.guidance_scale,
            stop_negative_gradient,
        )

    return predict


def decode(model: uae.UAE, parts: Mapping, how: Denoising, latents: Array) -> Array:
    """Latents `[N, h, w, C]` to pictures `[N, H, W, 3]`, about [-1, 1], not clipped."""
    return vae.decode_latents(model.vae, parts["vae"], latents, how.vae_chunk or None)


def draw(model: uae.UAE, parts: Mapping, how: Denoising, tokens: Array, lengths: Array, noise: Array) -> Array:
    """Captions to pictures by the deterministic sampler.

    Args:
      model, parts: the model.
      how: schedule and guidance.
      tokens, lengths: captions `[N, T]`, `[N]`.
      noise: `[N, h, w, C]`.

    Returns:
      `[N, H, W, 3]`, about [-1, 1], not clipped.
    """
    positive, negative = encode_condition(model, parts, how, tokens, lengths)
    latents = sample(predictor(model, parts, how, positive, negative), noise, jnp.asarray(how.sigmas))
    return decode(model, parts, how, latents)


def sample_keys(key: Array, sample_ids: Array, group: int = 1) -> Array:
    """One key a row from the global sample ids: typed keys `[B * group]`, rows of a group together.

    The same for any batch layout and number of devices.
    """
    per_image = jax.vmap(lambda index: jax.random.fold_in(key, index))(sample_ids)
    if group == 1:
        return per_image
    return jax.vmap(lambda image: jax.vmap(lambda member: jax.random.fold_in(image, member))(jnp.arange(group)))(
        per_image
    ).reshape(-1)


def initial_noise(model: uae.UAE, key: Array, sample_ids: Array, group: int, *, shared: bool) -> Array:
    """Noise `[B * group, h, w, C]` of the drawings of B images, rows of a group together.

    Args:
      model: for the shape.
      key: of the step; with the global sample ids `[B]` it decides every number.
      group: drawings of an image.
      shared: the same noise for all drawings of an image.
    """
    if shared:
        return jnp.repeat(uae.initial_noise(model, sample_keys(key, sample_ids)), group, axis=0)
    return uae.initial_noise(model, sample_keys(key, sample_ids, group))
