"""UAE as one description and one dictionary of parameters: captioner and decoder (arXiv 2509.09666, section 3).

The parts of the dictionary:
  vision, language   Qwen2.5-VL; `language` is also the reference policy
  language_lora      adapter of the captioner, or `language_policy`, a second copy for full fine-tuning
  transformer        of the decoder; `transformer_lora` or `transformer_policy` as for the language model
  vae                encoder and decoder of the latents
  encoders           {name: parameters} of the image encoders
and those of the decoder alone (`models.decoder.Decoder.parts`):
  projector, pooled  of SD3: language width to context width, and `[Dp]` of the empty prompt
  text_encoder       of decoders that bring their own
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Context, Decoder, Parts, TransformerSizes, check_condition
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.parts import captioner_weights, transformer_weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.nn.constrain import constrain

__all__ = (
    "UAE",
    "captioner_weights",
    "check_drawing",
    "check_guidance",
    "check_size",
    "initial_noise",
    "transformer_weights",
    "velocity",
)


@dataclasses.dataclass(frozen=True)
class UAE:
    """What does not change while a model trains; hashable, so that compiled functions can close over it.

    Attributes:
      captioner: Qwen2.5-VL's sizes.
      decoder: what draws images of captions.
      image_size: side of the images in pixels.
      banned: ranges (first, end) of ids that no caption may have, because the decoder would read them as no text.
    """

    captioner: Qwen2_5VLConfig
    decoder: Decoder
    image_size: int
    banned: tuple[tuple[int, int], ...] = ()

    @property
    def transformer(self) -> TransformerSizes:
        """Of the decoder."""
        return self.decoder.transformer

    @property
    def vae(self) -> Any:
        """Of the decoder."""
        return self.decoder.vae

    @property
    def template(self) -> ConditionTemplate:
        """Of the decoder."""
        return self.decoder.template

    @property
    def lora_targets(self) -> Mapping[str, str]:
        """The linear layers that a new adapter changes, as a pattern for each part that can have one."""
        return {"language": ADAPTER_PATTERN, "transformer": self.decoder.lora_targets}

    @property
    def text(self) -> TextConfig:
        """Sizes of the language model that writes captions."""
        return self.captioner.text

    @property
    def own_encoder(self) -> bool:
        """Whether the decoder has a text encoder of its own, which reads captions by their ids."""
        return "text_encoder" in self.decoder.parts

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image."""
        return self.decoder.latent_shape(self.image_size, self.image_size)


def velocity(
    model: UAE,
    parts: Parts,
    latents: Float[Array, "b rows columns c"],
    sigma: Float[Array, " b"],
    context: Context,
    *,
    policy: bool = True,
) -> Float[Array, "b rows columns c"]:
    """The decoder's velocity in float32; see `models.decoder.Decoder.velocity`."""
    return model.decoder.velocity(parts, latents, sigma, context, policy=policy)


def initial_noise(model: UAE, keys: Key[Array, " b"]) -> Float[Array, "b rows columns c"]:
    """Unit Gaussian latents, one typed key each."""
    return constrain(jax.vmap(lambda key: jax.random.normal(key, model.latent_shape, jnp.float32))(keys), "batch")


def check_drawing(model: UAE, guidance_scale: float, condition: str) -> None:
    """Checks that a decoder can draw with settings, before anything is computed.

    Raises:
      ValueError: it has no images of this size, no such guidance, or cannot read what the condition names.
    """
    check_size(model)
    check_condition(model.decoder, condition)
    check_guidance(model, guidance_scale)


def check_size(model: UAE) -> None:
    """Checks that an image is a whole number of image tokens, and has no more than the transformer has positions.

    Raises:
      ValueError: it is not; the message has a size that is.
    """
    size, cell = model.image_size, model.decoder.cell
    most = model.decoder.most_cells or size
    if size % cell or size // cell > most:
        near = min(max(1, round(size / cell)), most) * cell
        upto = f" up to {cell * most}" if model.decoder.most_cells else ""
        raise ValueError(f"size is {size} pixels; this model generates multiples of {cell}{upto}, such as {near}")


def check_guidance(model: UAE, scale: float) -> None:
    """Checks that a decoder knows guidance; `scale` 1 is without.

    Raises:
      ValueError: see `models.decoder.Decoder.guide`.
    """
    velocity = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    if scale != 1:
        jax.eval_shape(lambda both: model.decoder.guide(both, both, scale), velocity)
