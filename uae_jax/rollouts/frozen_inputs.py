"""What frozen parts make of images and captions: moments of latents, and states of captions before the projector.

Supervised stages compute them in every step, or read them from a folder of `stages.precompute`. The language model is
the reference and reads the text alone. The same functions are used for both.

Shape letters: b images, h w c latents, t caption tokens, s tokens of caption and template, d language width.
"""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models import condition, uae
from uae_jax.models.decoder import Context
from uae_jax.nn.images import signed
from uae_jax.trees import Tree

# fields of a batch (`data.precomputed`) of each part that can be computed before
LATENT_FIELDS = ("latent_mean", "latent_log_variance")
STATE_FIELDS = ("text_states", "text_mask")
FIELDS = {"latents": LATENT_FIELDS, "states": STATE_FIELDS}
# among the frozen parts of a stage that reads states: [1, S, D] of the negative prompt
NEGATIVE = "negative_states"


def image_moments(
    model: uae.UAE, parts: Mapping[str, Tree], pixels: Float[Array, "b height width 3"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """Mean and log-variance of the latents of images in [-1, 1]; a step draws one sample of them."""
    return model.decoder.encode_images(parts, pixels)


def text_states(
    model: uae.UAE, parts: Mapping[str, Tree], tokens: Int[Array, "b t"], lengths: Int[Array, " b"]
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
    """States of captions in their template by the decoder's frozen text encoder, and their mask.

    Args:
      model, parts: the model; of the parts only the text encoder is read.
      tokens: right-padded captions.
      lengths: tokens without the stop token.
    """
    ids, mask = model.decoder.prompt(tokens, lengths)
    return model.decoder.states(parts, ids, mask), mask


def caption_states(
    model: uae.UAE, parts: Mapping[str, Tree], batch: Mapping[str, Array]
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
    """`text_states` of the captions of a batch, whose last token is the stop token."""
    return text_states(model, parts, batch["caption_ids"], jnp.sum(batch["caption_mask"], -1, dtype=jnp.int32) - 1)


def encoded(
    model: uae.UAE, parts: Mapping[str, Tree], batch: Mapping[str, Array], names: Collection[str]
) -> dict[str, Array]:
    """The fields of the named parts of a batch with its pixels and captions (`data.loader`).

    Args:
      model: the description.
      parts: `vae` for latents, `language` for states.
      batch: its pixels may be bytes.
      names: keys of `FIELDS`.
    """
    found: dict[str, Array] = {}
    if "latents" in names:
        found |= zip(LATENT_FIELDS, image_moments(model, parts, signed(batch["pixels"])))
    if "states" in names:
        found |= zip(STATE_FIELDS, caption_states(model, parts, batch))
    return found


def field_shapes(model: uae.UAE, rows: int, caption_tokens: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the fields of a batch of so many rows, with captions of at most `caption_tokens`."""
    moments = jax.ShapeDtypeStruct((rows, *model.latent_shape), jnp.float32)
    states = negative_shape(model, caption_tokens)
    length, width = states.shape[1:]
    return dict.fromkeys(LATENT_FIELDS, moments) | {
        "text_states": jax.ShapeDtypeStruct((rows, length, width), states.dtype),
        "text_mask": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    }


def negative_shape(model: uae.UAE, caption_tokens: int) -> jax.ShapeDtypeStruct:
    """The shape of `negative_states`."""
    shape, dtype = model.decoder.states_shape(caption_tokens)
    return jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype))


def negative_states(model: uae.UAE, parts: Mapping[str, Tree], caption_tokens: int) -> Float[Array, "1 s d"]:
    """States of the negative prompt, of the length that captions of so many tokens have."""
    return text_states(model, parts, *condition.negative_tokens(model.template, caption_tokens))[0]


def _negative_mask(model: uae.UAE, length: int) -> Bool[Array, "1 s"]:
    template = model.template
    return jnp.arange(length)[None] < len(template.prefix) + len(template.negative) + len(template.suffix)


def with_dropped(
    model: uae.UAE, parts: Mapping[str, Tree], batch: Mapping[str, Array], dropped: Bool[Array, " b"]
) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
    """Precomputed states of a batch and their mask, with those of the negative prompt in place of some.

    Args:
      model, parts: the model, with `NEGATIVE` among the parts.
      batch: with `STATE_FIELDS`.
      dropped: which captions are replaced.
    """
    states, mask = (batch[name] for name in STATE_FIELDS)
    negative = _negative_mask(model, states.shape[1])
    return jnp.where(dropped[:, None, None], parts[NEGATIVE], states), jnp.where(dropped[:, None], negative, mask)


def stored_context(
    model: uae.UAE, parts: Mapping[str, Tree], batch: Mapping[str, Array], *, guided: bool
) -> tuple[Context, Context | None]:
    """Context of precomputed states and, where guidance is used, of the negative prompt.

    Args:
      model, parts: the model, with `NEGATIVE` among the parts.
      batch: with `STATE_FIELDS`.
      guided: whether guidance is used.
    """
    states, mask = (batch[name] for name in STATE_FIELDS)
    positive = model.decoder.context(parts, states, mask)
    if not guided:
        return positive, None
    return positive, model.decoder.context(parts, parts[NEGATIVE], _negative_mask(model, states.shape[1]))
