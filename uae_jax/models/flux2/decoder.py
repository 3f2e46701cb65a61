"""FLUX.2-klein as a decoder: Qwen3 encodes captions in its chat template, 512 tokens with their padding.

Source: diffusers' Flux2KleinPipeline. The states after 9, 18 and 27 layers stand side by side, without a norm. No token
of the text encoder attends to padding, but the transformer reads the padding's states: rows have one length always.
"""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32
from numpy import ndarray

from uae_jax.diffusion.schedule import check_scheduler, shifted_levels
from uae_jax.files.json_files import read_json
from uae_jax.hf.inventory import Table
from uae_jax.hf.rules import Rule
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Component, Context, Family, Parts, chat_text
from uae_jax.models.flux2 import transformer, vae, weights
from uae_jax.models.flux2.config import TransformerConfig, VAEConfig
from uae_jax.models.language import encoder
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.parts import transformer_weights
from uae_jax.models.qwen3 import config as qwen3
from uae_jax.models.text_encoded import TextEncoded, check_fit

NUM_TRAIN_TIMESTEPS = 1000
LAYERS = (9, 18, 27)
LENGTH = 512


def empirical_mu(tokens: int, steps: int) -> float:
    """The shift of an image of so many tokens: two lines, and between them a line in the steps, as in diffusers."""
    many = 0.00016927 * tokens + 0.45666666  # at 200 steps
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333  # at 10
    slope = (many - few) / 190.0
    return slope * steps + many - 200.0 * slope


@dataclasses.dataclass(frozen=True)
class KleinDecoder(TextEncoded):
    """A `models.decoder.Decoder`; rows of its template have one length.

    Attributes:
      distilled: whether it draws without guidance.
    """

    lora_targets: ClassVar[str] = transformer.ATTENTION_ADAPTER

    transformer: TransformerConfig
    vae: VAEConfig
    distilled: bool = False

    @property
    def cell(self) -> int:
        """Pixels a side of one token: a patch of the latents."""
        return self.vae.downsampling

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states themselves, all of which count."""
        return states, jnp.ones_like(mask)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, C) of patches."""
        return height // self.cell, width // self.cell, self.vae.channels

    def velocity(
        self,
        parts: Parts,
        latents: Float[Array, "b h w c"],
        sigma: Float[Array, " b"],
        context: Context,
        *,
        policy: bool = True,
    ) -> Float32[Array, "b h w c"]:
        """What the transformer predicts."""
        variables = transformer_weights(parts, policy=policy)
        model = transformer.Transformer(self.transformer)
        with_time = NUM_TRAIN_TIMESTEPS * sigma.astype(jnp.float32)
        return cast(Array, model.apply(variables, latents, with_time, context[0]))

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """Classifier-free guidance.

        Raises:
          ValueError: the model is distilled, and has never seen a negative prompt.
        """
        if self.distilled:
            told = f"guidance_scale is {scale:g}" if isinstance(scale, int | float) else "a guidance_scale is given"
            raise ValueError(f"{told}, but this FLUX.2-klein is distilled and needs no guidance; set it to 1")
        return super().guide(positive, negative, scale)

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """An exponential shift that depends on the number of tokens and of steps; `shift` is not read."""
        return shifted_levels(steps, empirical_mu((height // self.cell) * (width // self.cell), steps))

    def encode_images(
        self, parts: Parts, pixels: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of patches."""
        return vae.encode(self.vae, parts["vae"], pixels)

    def to_model_latents(self, parts: Parts, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """By the statistics of the batch norm."""
        return vae.to_model_latents(self.vae, parts["vae"], latents)

    def decode(
        self, parts: Parts, latents: Float[Array, "b h w c"], chunk: int | None = None
    ) -> Float[Array, "b height width 3"]:
        """See `vae.decode_latents`."""
        return vae.decode_latents(self.vae, parts["vae"], latents, chunk)

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of text encoder, transformer and auto-encoder."""
        return {
            "text_encoder": encoder.abstract_params(self.encoder),
            "transformer": transformer.abstract_params(self.transformer),
            "vae": vae.abstract_params(self.vae),
        }

    def transformer_rules(self) -> list[Rule]:
        """Of Flux2Transformer2DModel."""
        return weights.transformer_rules(self.transformer)


def encoder_sizes(text: TextConfig) -> EncoderSizes:
    """What is read of a Qwen3 of these sizes.

    Raises:
      ValueError: it has too few layers.
    """
    if text.layers < LAYERS[-1]:
        raise ValueError(
            f"a text encoder of {text.layers} layers is not klein's, which reads the states after {LAYERS}"
        )
    return EncoderSizes(text, LAYERS)


def is_distilled(folder: pathlib.Path) -> bool:
    """Whether a pipeline's folder says that its transformer is distilled."""
    return bool(read_json(folder, "model_index.json").get("is_distilled", False))


def defaults(folder: pathlib.Path) -> dict[str, Any]:
    """Of inference: 4 steps without guidance where distilled, else 50 steps at 4, as in the model cards."""
    return {"steps": 4, "guidance_scale": 1.0} if is_distilled(folder) else {"steps": 50, "guidance_scale": 4.0}


def _transformer_table(config: TransformerConfig) -> Table:
    return Table(weights.transformer_rules(config), transformer.abstract_params(config))


def _vae_table(config: VAEConfig) -> Table:
    return Table(weights.vae_rules(config), vae.abstract_params(config), ignore=weights.BUFFERS)


def describe(
    folder: pathlib.Path, template: ConditionTemplate, *, dtype: str, remat: str, lora_alpha: float
) -> KleinDecoder:
    """The description of a pipeline's folder.

    Args:
      folder: with `model_index.json`.
      template: ids around a caption.
      dtype, remat, lora_alpha: of a run.

    Raises:
      FileNotFoundError, ValueError: a config is absent or not supported, or the parts do not fit each other.
    """
    sizes = TransformerConfig.from_folder(folder / "transformer", dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    autoencoder = VAEConfig.from_folder(folder / "vae")
    read = encoder_sizes(qwen3.from_folder(folder / "text_encoder", dtype=dtype))
    check_scheduler(folder / "scheduler", use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=None)
    check_fit(
        folder,
        sizes,
        ("joint_attention_dim", read.width, "three times the width of text_encoder"),
        ("in_channels", autoencoder.channels, "four times the latent_channels of vae"),
    )
    return KleinDecoder(sizes, autoencoder, read, template, is_distilled(folder))


FAMILY = Family(
    name="FLUX.2-klein",
    pipeline="Flux2KleinPipeline",
    describe=describe,
    text=functools.partial(chat_text, enable_thinking=False),
    length=LENGTH,
    components={
        "transformer": Component(
            "transformer",
            TransformerConfig.from_folder,
            _transformer_table,
            module="diffusers.models.transformers.transformer_flux2",
        ),
        "vae": Component("vae", VAEConfig.from_folder, _vae_table),
        "text_encoder": Component(
            "text_encoder",
            qwen3.from_folder,
            encoder.whole_table,
            lambda config: encoder.read_table(encoder_sizes(config)),
            stem="model",
        ),
    },
    defaults=defaults,
)
