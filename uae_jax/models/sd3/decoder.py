"""SD3 as UAE uses it: captions are encoded by the captioner's language model, and projected to SD3's context.

Source: arXiv 2509.09666, section 3. The text encoders of SD3 itself are left out, but for the pooled embedding of the
empty prompt, the part `pooled`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpy import ndarray

from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.models.decoder import Context, Parts
from uae_jax.models.language import model as lm
from uae_jax.models.latents import NUM_TRAIN_TIMESTEPS, Coder, LatentDecoder, Network, Tables
from uae_jax.models.parts import captioner_weights
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.sd3 import transformer, vae, weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig


@dataclasses.dataclass(frozen=True)
class SD3Decoder(LatentDecoder):
    """A `models.decoder.Decoder`.

    Attributes:
      captioner: sizes of the captioner, whose language model is the text encoder.
    """

    conditions: ClassVar[tuple[str, ...]] = ("reference", "policy", "caption_states")
    parts: ClassVar[tuple[str, ...]] = ("projector", "transformer", "vae", "pooled")
    network: ClassVar[Network] = transformer
    coder: ClassVar[Coder] = vae
    tables: ClassVar[Tables] = weights

    transformer: TransformerConfig
    vae: VAEConfig
    captioner: Qwen2_5VLConfig

    @property
    def most_cells(self) -> int:
        """The side of the position table."""
        return self.transformer.pos_embed_max_size

    def states_shape(self, caption_tokens: int) -> tuple[tuple[int, int], str]:
        """Those of the language model."""
        text = self.captioner.text
        return (self.template.length(caption_tokens), text.width), text.dtype

    def states(
        self, parts: Parts, ids: Int[Array, "n s"], mask: Bool[Array, "n s"], *, policy: bool = False
    ) -> Float[Array, "n s d"]:
        """Hidden states of the language model, which reads the text alone."""
        params, adapter = captioner_weights(parts, policy=policy)
        return lm.text_hidden_states(self.captioner, params, adapter, ids, mask)

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states through the projector."""
        return qwen.project(parts["projector"], states), mask

    def predicted(
        self, model: Callable[..., Array], parts: Parts, latents: Array, sigma: Array, context: Context
    ) -> Array:
        """SD3 reads a pooled vector too."""
        pooled = jnp.broadcast_to(parts["pooled"], (latents.shape[0], parts["pooled"].shape[-1]))
        states, mask = context
        return model(latents, NUM_TRAIN_TIMESTEPS * sigma, states, pooled, mask)

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """A static shift, whatever the size of the images."""
        return sigma_schedule(steps, shift)

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of transformer, auto-encoder and pooled embedding; the projector's are its files' own."""
        pooled = jax.ShapeDtypeStruct((self.transformer.pooled_projection_dim,), jnp.float32)
        return {**super().abstract_parts(), "pooled": pooled}
