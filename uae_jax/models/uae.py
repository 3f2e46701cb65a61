"""UAE as one description and one dictionary of parameters: captioner, projector, decoder (arXiv 2509.09666, section 3).

The parts of the dictionary:
  vision, language   Qwen2.5-VL; `language` is also the text encoder and the reference policy
  language_lora      adapter of the captioner, or `language_policy`, a second copy for full fine-tuning
  projector          language width to context width
  transformer        SD3 / SD3.5; `transformer_lora` or `transformer_policy` as for the language model
  vae                encoder and decoder of the latents
  pooled             `[Dp]`, the pooled embedding of the empty prompt, both branches of guidance
  encoders           {name: parameters} of the image encoders
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig
from uae_jax.models.sd3.transformer import Transformer
from uae_jax.nn.constrain import constrain

NUM_TRAIN_TIMESTEPS = 1000

Parts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class UAE:
    """What does not change while a model trains; hashable, so that compiled functions can close over it.

    Attributes:
      captioner: Qwen2.5-VL's sizes.
      transformer: the diffusion transformer's sizes.
      vae: the auto-encoder's sizes and latent scale.
      template: ids around a caption in the decoder's condition.
      image_size: side of the images in pixels.
    """

    captioner: Qwen2_5VLConfig
    transformer: TransformerConfig
    vae: VAEConfig
    template: ConditionTemplate
    image_size: int

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of the latents of an image."""
        side = self.image_size // self.vae.downsampling
        return side, side, self.vae.latent_channels


def captioner_weights(parts: Parts, *, policy: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters `{"vision", "language", "projector"}` and adapter of the captioner.

    Args:
      parts: the model's dictionary.
      policy: the trained captioner, or the reference (adapter off), which is also the text encoder.
    """
    params = {name: parts[name] for name in ("vision", "language", "projector")}
    if not policy:
        return params, None
    if "language_policy" in parts:
        return params | {"language": parts["language_policy"]}, None
    return params, parts.get("language_lora")


def transformer_weights(parts: Parts, *, policy: bool) -> dict[str, Any]:
    """Flax variables of the transformer: the trained one, or the reference (adapter off)."""
    if not policy:
        return {"params": parts["transformer"]}
    if "transformer_policy" in parts:
        return {"params": parts["transformer_policy"]}
    variables = {"params": parts["transformer"]}
    return variables | {"lora": parts["transformer_lora"]} if "transformer_lora" in parts else variables


def velocity(
    model: UAE,
    parts: Parts,
    latents: Float[Array, "b rows columns c"],
    sigma: Float[Array, " b"],
    context: tuple[Float[Array, "b s d_context"], Bool[Array, "b s"]],
    *,
    policy: bool = True,
) -> Float[Array, "b rows columns c"]:
    """The transformer's velocity in float32.

    Args:
      model: sizes.
      parts: the model's dictionary.
      latents: noisy, in the scale of the diffusion model.
      sigma: noise levels in [0, 1].
      context: the condition and its mask.
      policy: see `transformer_weights`.
    """
    pooled = jnp.broadcast_to(parts["pooled"], (latents.shape[0], parts["pooled"].shape[-1]))
    states, mask = context
    variables = transformer_weights(parts, policy=policy)
    transformer = Transformer(model.transformer)
    return cast(Array, transformer.apply(variables, latents, NUM_TRAIN_TIMESTEPS * sigma, states, pooled, mask))


def initial_noise(model: UAE, keys: Key[Array, " b"]) -> Float[Array, "b rows columns c"]:
    """Unit Gaussian latents, one typed key each."""
    return constrain(jax.vmap(lambda key: jax.random.normal(key, model.latent_shape, jnp.float32))(keys), "batch")
