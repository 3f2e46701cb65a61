"""SD3 as UAE uses it: captions are encoded by the captioner's language model, and projected to SD3's context.

Source: arXiv 2509.09666, section 3. The text encoders of SD3 itself are left out, but for the pooled embedding of the
empty prompt, the part `pooled`.
"""

import dataclasses
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int
from numpy import ndarray

from uae_jax.diffusion.sampler import linear_guidance
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.hf.rules import Rule
from uae_jax.models.condition import ConditionTemplate, place_in_template
from uae_jax.models.decoder import Context, Parts
from uae_jax.models.language import model as lm
from uae_jax.models.parts import captioner_weights, transformer_weights
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.sd3 import transformer, vae, weights
from uae_jax.models.sd3.config import TransformerConfig, VAEConfig

NUM_TRAIN_TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class SD3Decoder:
    """A `models.decoder.Decoder`.

    Attributes:
      captioner: sizes of the captioner, whose language model is the text encoder.
      transformer: sizes of the diffusion transformer.
      vae: sizes of the auto-encoder and its latent scale.
      template: ids around a caption.
    """

    conditions: ClassVar[tuple[str, ...]] = ("reference", "policy", "caption_states")
    lora_targets: ClassVar[str] = transformer.ATTENTION_ADAPTER
    parts: ClassVar[tuple[str, ...]] = ("projector", "transformer", "vae", "pooled")

    captioner: Qwen2_5VLConfig
    transformer: TransformerConfig
    vae: VAEConfig
    template: ConditionTemplate

    @property
    def cell(self) -> int:
        """Pixels a side of one token."""
        return self.vae.downsampling * self.transformer.patch_size

    @property
    def most_cells(self) -> int:
        """The side of the position table."""
        return self.transformer.pos_embed_max_size

    def prompt(
        self, tokens: Int[Array, "n t"], lengths: Int[Array, " n"]
    ) -> tuple[Int[Array, "n s"], Bool[Array, "n s"]]:
        """See `condition.place_in_template`."""
        return place_in_template(self.template, tokens, lengths)

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

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of the auto-encoder."""
        return height // self.vae.downsampling, width // self.vae.downsampling, self.vae.latent_channels

    def velocity(
        self,
        parts: Parts,
        latents: Float[Array, "b h w c"],
        sigma: Float[Array, " b"],
        context: Context,
        *,
        policy: bool = True,
    ) -> Float32[Array, "b h w c"]:
        """What SD3 predicts."""
        pooled = jnp.broadcast_to(parts["pooled"], (latents.shape[0], parts["pooled"].shape[-1]))
        states, mask = context
        variables = transformer_weights(parts, policy=policy)
        model = transformer.Transformer(self.transformer)
        return cast(Array, model.apply(variables, latents, NUM_TRAIN_TIMESTEPS * sigma, states, pooled, mask))

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """Classifier-free guidance."""
        return linear_guidance(positive, negative, scale)

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """A static shift, whatever the size of the images."""
        return sigma_schedule(steps, shift)

    def encode_images(
        self, parts: Parts, pixels: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the auto-encoder."""
        return vae.encode(self.vae, parts["vae"], pixels)

    def to_model_latents(self, parts: Parts, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """One shift and scale for all channels."""
        return vae.to_model_latents(self.vae, latents)

    def decode(
        self, parts: Parts, latents: Float[Array, "b h w c"], chunk: int | None = None
    ) -> Float[Array, "b height width 3"]:
        """See `vae.decode_latents`."""
        return vae.decode_latents(self.vae, parts["vae"], latents, chunk)

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of transformer, auto-encoder and pooled embedding; the projector's are its files' own."""
        return {
            "transformer": transformer.abstract_params(self.transformer),
            "vae": vae.abstract_params(self.vae),
            "pooled": jax.ShapeDtypeStruct((self.transformer.pooled_projection_dim,), jnp.float32),
        }

    def transformer_rules(self) -> list[Rule]:
        """Of SD3Transformer2DModel."""
        return weights.transformer_rules(self.transformer)
