"""Z-Image as a decoder: Qwen3 encodes captions in its chat template; padding is masked.

Source: diffusers' ZImagePipeline. The states before the last layer are read, without a norm. What diffusers calls
guidance_scale is one less than ours: `v+ + s (v+ - v-)`.
"""

import dataclasses
import functools
import pathlib
from typing import Any, ClassVar, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from numpy import ndarray

from uae_jax.diffusion.schedule import check_scheduler, shifted_once
from uae_jax.hf.inventory import Table
from uae_jax.hf.rules import Rule
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Component, Context, Family, Parts, chat_text
from uae_jax.models.language import encoder
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.parts import transformer_weights
from uae_jax.models.qwen3 import config as qwen3
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.models.sd3.weights import VAE_ALIASES, vae_rules
from uae_jax.models.text_encoded import TextEncoded, check_fit
from uae_jax.models.z_image import transformer, weights
from uae_jax.models.z_image.config import TransformerConfig

MOST_TOKENS = 512
TURBO_SHIFT = 3.0  # the base model's is 6


@dataclasses.dataclass(frozen=True)
class ZImageDecoder(TextEncoded):
    """A `models.decoder.Decoder`.

    Attributes:
      static_shift: of the noise levels.
    """

    lora_targets: ClassVar[str] = transformer.ATTENTION_ADAPTER

    transformer: TransformerConfig
    vae: VAEConfig
    static_shift: float = 6.0

    @property
    def cell(self) -> int:
        """Pixels a side of one token: a patch of 2 x 2 latents."""
        return 2 * self.vae.downsampling

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
        """Minus what the transformer predicts at the time 1 - sigma."""
        variables = transformer_weights(parts, policy=policy)
        model = transformer.Transformer(self.transformer)
        time = self.transformer.t_scale * (1 - sigma.astype(jnp.float32))
        return -cast(Array, model.apply(variables, latents, time, *context))

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """The shift of the scheduler's folder, whatever the size of the images; `shift` is not read."""
        return shifted_once(steps, self.static_shift)

    def encode_images(
        self, parts: Parts, pixels: Float[Array, "b height width 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Mean and log-variance of the auto-encoder, FLUX.1's."""
        return vae.encode(self.vae, parts["vae"], pixels)

    def to_model_latents(self, parts: Parts, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """One shift and scale for all channels."""
        return vae.to_model_latents(self.vae, latents)

    def decode(
        self, parts: Parts, latents: Float[Array, "b h w c"], chunk: int | None = None
    ) -> Float[Array, "b height width 3"]:
        """See `sd3.vae.decode_latents`."""
        return vae.decode_latents(self.vae, parts["vae"], latents, chunk)

    def abstract_parts(self) -> dict[str, Any]:
        """Shapes of text encoder, transformer and auto-encoder."""
        return {
            "text_encoder": encoder.abstract_params(self.encoder),
            "transformer": transformer.abstract_params(self.transformer),
            "vae": vae.abstract_params(self.vae),
        }

    def transformer_rules(self) -> list[Rule]:
        """Of ZImageTransformer2DModel."""
        return weights.transformer_rules(self.transformer)


def encoder_sizes(text: TextConfig) -> EncoderSizes:
    """What is read of a Qwen3 of these sizes: all layers but the last."""
    return EncoderSizes(text, (text.layers - 1,))


def _transformer_table(config: TransformerConfig) -> Table:
    return Table(weights.transformer_rules(config), transformer.abstract_params(config))


def _vae_table(config: VAEConfig) -> Table:
    return Table(vae_rules(config), vae.abstract_params(config), VAE_ALIASES)


def describe(
    folder: pathlib.Path, template: ConditionTemplate, *, dtype: str, remat: str, lora_alpha: float
) -> ZImageDecoder:
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
    check_fit(
        folder,
        sizes,
        ("cap_feat_dim", read.width, "the width of text_encoder"),
        ("in_channels", autoencoder.latent_channels, "the latent_channels of vae"),
    )
    return ZImageDecoder(sizes, autoencoder, read, template, _shift(folder))


def _shift(folder: pathlib.Path) -> float:
    stored = check_scheduler(folder / "scheduler", use_dynamic_shifting=False, shift_terminal=None)
    return float(stored.get("shift", 1.0))


def defaults(folder: pathlib.Path) -> dict[str, Any]:
    """Of inference, as in the model cards: Turbo 8 steps without guidance, the base model 50 steps at s = 4."""
    turbo = _shift(folder) == TURBO_SHIFT
    return {"steps": 8, "guidance_scale": 1.0} if turbo else {"steps": 50, "guidance_scale": 5.0}


FAMILY = Family(
    name="Z-Image",
    pipeline="ZImagePipeline",
    describe=describe,
    text=functools.partial(chat_text, enable_thinking=True),
    most=MOST_TOKENS,
    components={
        "transformer": Component(
            "transformer",
            TransformerConfig.from_folder,
            _transformer_table,
            module="diffusers.models.transformers.transformer_z_image",
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
