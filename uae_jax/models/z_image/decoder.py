"""Z-Image as a decoder: Qwen3 encodes captions in its chat template; padding is masked.

Source: diffusers' ZImagePipeline. The states before the last layer are read, without a norm. What diffusers calls
guidance_scale is one less than ours: `v+ + s (v+ - v-)`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array, Float
from numpy import ndarray

from uae_jax.diffusion.schedule import check_scheduler, shifted_once
from uae_jax.hf.inventory import Table
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Component, Context, Family, Parts, Published, chat_text
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.latents import Coder, Network, Tables, check_fit
from uae_jax.models.qwen3 import config as qwen3
from uae_jax.models.qwen3.component import text_encoder
from uae_jax.models.sd3 import vae
from uae_jax.models.sd3.config import VAEConfig
from uae_jax.models.sd3.weights import VAE_ALIASES, vae_rules
from uae_jax.models.text_encoded import TextEncoded, transformer_part
from uae_jax.models.z_image import transformer, weights
from uae_jax.models.z_image.config import TransformerConfig

MOST_TOKENS = 512
BASE_SHIFT, TURBO_SHIFT = 6.0, 3.0


@dataclasses.dataclass(frozen=True)
class ZImageDecoder(TextEncoded):
    """A `models.decoder.Decoder`, whose auto-encoder is FLUX.1's.

    Attributes:
      static_shift: of the noise levels.
    """

    network: ClassVar[Network] = transformer
    coder: ClassVar[Coder] = vae
    tables: ClassVar[Tables] = weights

    transformer: TransformerConfig
    vae: VAEConfig
    static_shift: float = BASE_SHIFT

    def predicted(
        self, model: Callable[..., Array], parts: Parts, latents: Array, sigma: Array, context: Context
    ) -> Array:
        """Minus what the transformer predicts at the time 1 - sigma."""
        return -model(latents, self.transformer.t_scale * (1 - sigma), *context)

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[ndarray, " levels"]:
        """The shift of the scheduler's folder, whatever the size of the images; `shift` is not read."""
        return shifted_once(steps, self.static_shift)


def encoder_sizes(text: TextConfig) -> EncoderSizes:
    """What is read of a Qwen3 of these sizes: all layers but the last."""
    return EncoderSizes(text, (text.layers - 1,))


def _vae_table(config: VAEConfig) -> Table:
    return Table(vae_rules(config), vae.abstract_params(config), VAE_ALIASES)


def describe(
    folder: pathlib.Path, template: ConditionTemplate, *, dtype: str, remat: str, lora_alpha: float
) -> ZImageDecoder:
    """See `models.decoder.Family`."""
    sizes = TransformerConfig.from_folder(folder / "transformer", dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    autoencoder = VAEConfig.from_folder(folder / "vae")
    read = encoder_sizes(qwen3.from_folder(folder / "text_encoder", dtype=dtype))
    check_fit(
        folder / "transformer" / "config.json",
        sizes,
        {
            "cap_feat_dim": (read.width, "the width of text_encoder"),
            "in_channels": (autoencoder.channels, "the latent_channels of vae"),
        },
    )
    return ZImageDecoder(sizes, autoencoder, template, read, _shift(folder))


def _shift(folder: pathlib.Path) -> float:
    stored = check_scheduler(folder / "scheduler", use_dynamic_shifting=False, shift_terminal=None)
    return float(stored.get("shift", 1.0))


def defaults(folder: pathlib.Path) -> dict[str, Any]:
    """Of inference, as in the model cards: Turbo 8 steps without guidance, the base model 50 steps at s = 4."""
    turbo = _shift(folder) == TURBO_SHIFT
    return {"steps": 8, "guidance_scale": 1.0} if turbo else {"steps": 50, "guidance_scale": 5.0}


def published(dtype: str, remat: str, lora_alpha: float, *, shift: float) -> ZImageDecoder:
    """Of Tongyi-MAI/Z-Image and Z-Image-Turbo, whose noise levels alone differ: a user's turn with thinking."""
    sizes = TransformerConfig(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    autoencoder = VAEConfig(scaling_factor=0.3611, shift_factor=0.1159)
    template = ConditionTemplate(*qwen3.TURN, (), qwen3.PAD, most=MOST_TOKENS)
    return ZImageDecoder(sizes, autoencoder, template, encoder_sizes(qwen3.QWEN3_4B.using(dtype=dtype)), shift)


FAMILY = Family(
    name="Z-Image",
    pipeline="ZImagePipeline",
    describe=describe,
    text=functools.partial(chat_text, enable_thinking=True),
    most=MOST_TOKENS,
    components={
        "transformer": transformer_part(ZImageDecoder, TransformerConfig.from_folder, "transformer_z_image"),
        "vae": Component("vae", VAEConfig.from_folder, _vae_table),
        "text_encoder": text_encoder(encoder_sizes),
    },
    defaults=defaults,
    published={
        "z_image": Published(functools.partial(published, shift=BASE_SHIFT), "Tongyi-MAI/Z-Image", "Apache-2.0"),
        "z_image_turbo": Published(
            functools.partial(published, shift=TURBO_SHIFT), "Tongyi-MAI/Z-Image-Turbo", "Apache-2.0"
        ),
    },
)
