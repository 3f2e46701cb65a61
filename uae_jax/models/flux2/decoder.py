"""FLUX.2-klein as a decoder: Qwen3 encodes captions in its chat template, 512 tokens with their padding.

Source: diffusers' Flux2KleinPipeline. The states after 9, 18 and 27 layers stand side by side, without a norm. No token
of the text encoder attends to padding, but the transformer reads the padding's states: rows have one length always.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32
from numpy import ndarray

from uae_jax.diffusion.schedule import check_scheduler, shifted_levels
from uae_jax.files.json_files import read_json
from uae_jax.hf.inventory import Table
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Component, Context, Family, Parts, Published, chat_text
from uae_jax.models.flux2 import transformer, vae, weights
from uae_jax.models.flux2.config import TransformerConfig, VAEConfig
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.latents import NUM_TRAIN_TIMESTEPS, Coder, Network, Tables, check_fit
from uae_jax.models.qwen3 import config as qwen3
from uae_jax.models.qwen3.component import text_encoder
from uae_jax.models.text_encoded import TextEncoded, transformer_part

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

    network: ClassVar[Network] = transformer
    coder: ClassVar[Coder] = vae
    tables: ClassVar[Tables] = weights

    transformer: TransformerConfig
    vae: VAEConfig
    distilled: bool = False

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states themselves, all of which count."""
        return states, jnp.ones_like(mask)

    def predicted(
        self, model: Callable[..., Array], parts: Parts, latents: Array, sigma: Array, context: Context
    ) -> Array:
        """Without the mask: all states count."""
        return model(latents, NUM_TRAIN_TIMESTEPS * sigma, context[0])

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


def encoder_sizes(text: TextConfig, place: str | pathlib.Path = "the text encoder") -> EncoderSizes:
    """What is read of a Qwen3 of these sizes; `place` is for the message.

    Raises:
      ValueError: it has too few layers.
    """
    if text.layers < LAYERS[-1]:
        raise ValueError(
            f"{place} has {text.layers} layers, and klein reads the states after {LAYERS}; take all folders "
            "from one model"
        )
    return EncoderSizes(text, LAYERS)


def is_distilled(folder: pathlib.Path) -> bool:
    """Whether a pipeline's folder says that its transformer is distilled."""
    return bool(read_json(folder, "model_index.json").get("is_distilled", False))


def defaults(folder: pathlib.Path) -> dict[str, Any]:
    """Of inference: 4 steps without guidance where distilled, else 50 steps at 4, as in the model cards."""
    return {"steps": 4, "guidance_scale": 1.0} if is_distilled(folder) else {"steps": 50, "guidance_scale": 4.0}


def _vae_table(config: VAEConfig) -> Table:
    return Table(weights.vae_rules(config), vae.abstract_params(config), ignore=weights.BUFFERS)


def describe(
    folder: pathlib.Path, template: ConditionTemplate, *, dtype: str, remat: str, lora_alpha: float
) -> KleinDecoder:
    """See `models.decoder.Family`."""
    sizes = TransformerConfig.from_folder(folder / "transformer", dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    autoencoder = VAEConfig.from_folder(folder / "vae")
    place = folder / "text_encoder"
    read = encoder_sizes(qwen3.from_folder(place, dtype=dtype), place)
    check_scheduler(folder / "scheduler", use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=None)
    check_fit(
        folder / "transformer" / "config.json",
        sizes,
        {
            "joint_attention_dim": (read.width, "three times the width of text_encoder"),
            "in_channels": (autoencoder.channels, "four times the latent_channels of vae"),
        },
    )
    return KleinDecoder(sizes, autoencoder, template, read, is_distilled(folder))


def published(dtype: str, remat: str, lora_alpha: float, *, distilled: bool) -> KleinDecoder:
    """Of black-forest-labs/FLUX.2-klein-4B, which is distilled, and -base-4B: a user's turn without thinking."""
    sizes = TransformerConfig(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    before, after = qwen3.TURN
    template = ConditionTemplate(before, (*after, *qwen3.NO_THINKING), (), qwen3.PAD, LENGTH)
    return KleinDecoder(sizes, VAEConfig(), template, encoder_sizes(qwen3.QWEN3_4B.using(dtype=dtype)), distilled)


FAMILY = Family(
    name="FLUX.2-klein",
    pipeline="Flux2KleinPipeline",
    describe=describe,
    text=functools.partial(chat_text, enable_thinking=False),
    length=LENGTH,
    components={
        "transformer": transformer_part(KleinDecoder, TransformerConfig.from_folder, "transformer_flux2"),
        "vae": Component("vae", VAEConfig.from_folder, _vae_table),
        "text_encoder": text_encoder(encoder_sizes),
    },
    defaults=defaults,
    published={
        "klein_4b": Published(
            functools.partial(published, distilled=True), "black-forest-labs/FLUX.2-klein-4B", "Apache-2.0"
        ),
        "klein_base_4b": Published(
            functools.partial(published, distilled=False), "black-forest-labs/FLUX.2-klein-base-4B", "Apache-2.0"
        ),
    },
)
