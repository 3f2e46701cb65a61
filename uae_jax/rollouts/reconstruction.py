"""From captions to images: condition, guided denoising, VAE decoding. The decoder half of every stage and of inference.

Shape letters: b originals, n captions or generated images, t caption tokens, s tokens of caption and template, d width
of the context, `h w c` latents, `H W` image size.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from uae_jax.diffusion.sampler import guided_velocity, sample
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.models import condition, uae
from uae_jax.models.decoder import Context, check_condition
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.trees import Tree, name_key

DRAWING = "drawing"  # scope of denoising and decoding in a traced step (`planning.flops`)


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How images are sampled.

    Attributes:
      sigmas: noise levels from 1 to 0, one more than steps (`diffusion.schedule`).
      guidance_scale: 1 skips the negative prompt.
      condition: one of `conditions.CONDITIONS`. A text without an image has no states of its own; the policy then
        encodes it.
      vae_chunk: images decoded at once; 0 for all.
    """

    sigmas: tuple[float, ...]
    guidance_scale: float = 1.0
    condition: str = "reference"
    vae_chunk: int = 0


def noise_levels(model: uae.UAE, steps: int, shift: float, kind: str) -> tuple[float, ...]:
    """The sampler's `steps + 1` levels from 1 to 0.

    Args:
      model: for the decoder and the size of the images.
      steps: velocity evaluations.
      shift: static shift of the levels, where the decoder's is not its own.
      kind: `diffusers` for the levels of diffusers' pipeline of this decoder, else one of `schedule.KINDS`.
    """
    size = model.image_size
    own = kind == "diffusers"
    levels = model.decoder.sigmas(steps, size, size, shift) if own else sigma_schedule(steps, shift, kind)
    return tuple(float(level) for level in levels)


def encode_condition(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    tokens: Int[Array, "n t"],
    lengths: Int[Array, " n"],
) -> tuple[Context, Context | None]:
    """Context of captions and, where guidance is used, of the negative prompt.

    Args:
      model, parts: the model.
      how: guidance and which language model encodes.
      tokens: right-padded.
      lengths: tokens without the stop token.
    """
    check_condition(model.decoder, how.condition)
    policy = how.condition != "reference"
    return _encoded(model, parts, tokens, lengths, policy), _negative(model, parts, how, tokens.shape[1], policy)


def caption_states(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    batch: Mapping[str, Array],
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
    image_embeds: Float[Array, "b p d"] | None = None,
    *,
    policy: bool = True,
) -> tuple[Context, Context | None]:
    """Context of captions by their own states after prompt and image, padded to the negative prompt's length.

    Args:
      model, parts: the model; how: guidance.
      batch: b images with prompts (`data.loader`).
      tokens: captions, rows of an image together.
      mask: true up to and including the stop token.
      image_embeds: of `captioning.encode_batch_images`, to share them; None computes them.
      policy: whether the trained captioner computes the states, or the reference.
    """
    check_condition(model.decoder, "caption_states")
    params, adapter = uae.captioner_weights(parts, policy=policy)
    prefix = qwen.prompt_prefix(model.captioner, params, adapter, batch, image_embeds)
    hidden = lm.own_hidden_states(model.captioner, params, adapter, prefix, tokens, mask)
    room = ((0, 0), (0, model.template.length(tokens.shape[1]) - tokens.shape[1]))
    projected, _ = model.decoder.context(parts, hidden, mask)
    positive = jnp.pad(projected, (*room, (0, 0))), jnp.pad(mask, room)
    return positive, _negative(model, parts, how, tokens.shape[1], policy)


def caption_context(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    batch: Mapping[str, Array],
    tokens: Int[Array, "n t"],
    mask: Bool[Array, "n t"],
    lengths: Int[Array, " n"],
    image_embeds: Float[Array, "b p d"] | None = None,
    *,
    policy: bool = True,
) -> tuple[Context, Context | None]:
    """Context of the captions of images as `how.condition` says, and that of the negative prompt.

    Args:
      model, parts, how, batch, tokens, mask, image_embeds, policy: see `caption_states`.
      lengths: tokens without the stop token.
    """
    if how.condition == "caption_states":
        return caption_states(model, parts, how, batch, tokens, mask, image_embeds, policy=policy)
    return encode_condition(model, parts, how, tokens, lengths)


def _encoded(
    model: uae.UAE, parts: Mapping[str, Tree], tokens: Int[Array, "n t"], lengths: Int[Array, " n"], policy: bool
) -> Context:
    """Captions to what the transformer reads."""
    decoder = model.decoder
    ids, mask = decoder.prompt(tokens, lengths)
    return decoder.context(parts, decoder.states(parts, ids, mask, policy=policy), mask)


def _negative(
    model: uae.UAE, parts: Mapping[str, Tree], how: Denoising, caption_tokens: int, policy: bool
) -> Context | None:
    """Context of the negative prompt where guidance is used, of the length that captions of so many tokens have."""
    if how.guidance_scale == 1:
        return None
    return _encoded(model, parts, *condition.negative_tokens(model.template, caption_tokens), policy)


def predictor(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    positive: Context,
    negative: Context | None,
    *,
    policy: bool = True,
    stop_negative_gradient: bool = False,
) -> Callable[[Float[Array, "n h w c"], Float[Array, ""]], Float32[Array, "n h w c"]]:
    """`predict(latents, sigma) -> velocity` for the sampling loops."""

    def predict(latents: Float[Array, "n h w c"], sigma: Float[Array, ""]) -> Float32[Array, "n h w c"]:
        return guided_velocity(
            lambda x, s, context: uae.velocity(model, parts, x, s, context, policy=policy),
            latents,
            sigma,
            positive,
            negative,
            how.guidance_scale,
            stop_negative_gradient,
            model.decoder.guide,
        )

    return predict


def decode(
    model: uae.UAE, parts: Mapping[str, Tree], how: Denoising, latents: Float[Array, "n h w c"]
) -> Float[Array, "n H W 3"]:
    """Images of latents, about [-1, 1], not clipped."""
    return model.decoder.decode(parts, latents, how.vae_chunk or None)


def draw(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    tokens: Int[Array, "n t"],
    lengths: Int[Array, " n"],
    noise: Float[Array, "n h w c"],
) -> Float[Array, "n H W 3"]:
    """Images of captions by the deterministic sampler, about [-1, 1], not clipped.

    Args:
      model, parts: the model.
      how: schedule and guidance.
      tokens, lengths: captions, see `encode_condition`.
      noise: initial latents.
    """
    return draw_from(model, parts, how, encode_condition(model, parts, how, tokens, lengths), noise)


def draw_from(
    model: uae.UAE,
    parts: Mapping[str, Tree],
    how: Denoising,
    contexts: tuple[Context, Context | None],
    noise: Float[Array, "n h w c"],
) -> Float[Array, "n H W 3"]:
    """`draw` from the context of `encode_condition` or `caption_states`, and that of the negative prompt."""
    positive, negative = contexts
    with jax.named_scope(DRAWING):
        latents = sample(predictor(model, parts, how, positive, negative), noise, jnp.asarray(how.sigmas))
        return decode(model, parts, how, latents)


def sample_keys(key: Key[Array, ""], sample_ids: Int[Array, " b"], group: int = 1) -> Key[Array, " n"]:
    """One key per row from the global sample ids, n = b * group, rows of a group together.

    The keys are the same for any batch layout and number of devices.
    """
    per_image = jax.vmap(lambda index: jax.random.fold_in(key, index))(sample_ids)
    if group == 1:
        return per_image
    return jax.vmap(lambda image: jax.vmap(lambda member: jax.random.fold_in(image, member))(jnp.arange(group)))(
        per_image
    ).reshape(-1)


def shuffled(
    reward: Float32[Array, "*shape"], compared: int, sample_ids: Int[Array, " b"], key: Key[Array, ""]
) -> Float32[Array, "*shape"]:
    """Rewards in random order among those that are compared with each other: a control in which they say nothing.

    Args:
      reward: of all samples, those of an image together.
      compared: how many neighbours are compared with each other.
      sample_ids: global; they and the key decide the order.
      key: of the step.
    """
    rows = reward.reshape(-1, compared)
    keys = sample_keys(name_key(key, "shuffle"), sample_ids, len(rows) // len(sample_ids))
    return jax.vmap(jax.random.permutation)(keys, rows).reshape(reward.shape)


def initial_noise(
    model: uae.UAE, key: Key[Array, ""], sample_ids: Int[Array, " b"], group: int, *, shared: bool
) -> Float32[Array, "n h w c"]:
    """Initial latents of the images generated for b originals, n = b * group, rows of a group together.

    Args:
      model: for the shape.
      key: of the step; key and sample ids decide every number.
      sample_ids: global.
      group: generated images per original.
      shared: one noise for all generated images of an original.
    """
    if shared:
        return jnp.repeat(uae.initial_noise(model, sample_keys(key, sample_ids)), group, axis=0)
    return uae.initial_noise(model, sample_keys(key, sample_ids, group))
