"""Qwen-Image as a decoder: Qwen2.5-VL's language model encodes captions in a template of its own; padding is masked.

Source: diffusers' QwenImagePipeline. The template has a system turn, whose first 34 tokens are dropped after encoding.
The last states are read, through the final norm. A guided velocity gets the length of the caption's, patch by patch.
"""

import dataclasses
import pathlib
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from uae_jax.diffusion.schedule import check_scheduler, shifted_levels
from uae_jax.hf.inventory import Table
from uae_jax.models.condition import ConditionTemplate
from uae_jax.models.decoder import Component, Context, Family, Parts, Published
from uae_jax.models.language import encoder
from uae_jax.models.language.config import TextConfig
from uae_jax.models.language.encoder import EncoderSizes
from uae_jax.models.latents import Coder, Network, Tables, check_fit
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig
from uae_jax.models.qwen_image import transformer, vae, weights
from uae_jax.models.qwen_image.config import TransformerConfig, VAEConfig
from uae_jax.models.text_encoded import TextEncoded, transformer_part

DROPPED = 34  # first tokens of the template, whose states are not read
MOST_TOKENS = DROPPED + 512
SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
# ids of the template's turns before a caption and behind it
_SYSTEM_IDS = (74785, 279, 2168, 553, 44193, 279, 1894, 11, 6083, 11, 1379, 11, 10434, 11, 12194, 11, 1467, 11, 27979)
_SYSTEM_IDS += (11871, 315, 279, 6171, 323, 4004, 25)
TURNS = (
    (151644, 8948, 198, *_SYSTEM_IDS, 151645, 198, 151644, 872, 198),
    (151645, 198, 151644, 77091, 198),
)
VISION = r"visual\..*"


@dataclasses.dataclass(frozen=True)
class Shift:
    """How the noise levels are shifted: exponentially, by a line in the image's tokens, and stretched.

    Attributes:
      base_image_seq_len, max_image_seq_len: tokens of the line's two points.
      base_shift, max_shift: its values there.
      shift_terminal: the last level before 0.
    """

    base_image_seq_len: int = 256
    max_image_seq_len: int = 8192
    base_shift: float = 0.5
    max_shift: float = 0.9
    shift_terminal: float = 0.02

    def mu(self, tokens: int) -> float:
        """The logarithm of the shift."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


@dataclasses.dataclass(frozen=True)
class QwenImageDecoder(TextEncoded):
    """A `models.decoder.Decoder`.

    Attributes:
      shift: of the noise levels.
    """

    network: ClassVar[Network] = transformer
    coder: ClassVar[Coder] = vae
    tables: ClassVar[Tables] = weights

    transformer: TransformerConfig
    vae: VAEConfig
    shift: Shift = Shift()

    def states_shape(self, caption_tokens: int) -> tuple[tuple[int, int], str]:
        """Without the dropped tokens."""
        (length, width), dtype = super().states_shape(caption_tokens)
        return (length - DROPPED, width), dtype

    def states(
        self, parts: Parts, ids: Int[Array, "n s"], mask: Bool[Array, "n s"], *, policy: bool = False
    ) -> Float[Array, "n s d"]:
        """Of the whole prompt, without those of its first tokens."""
        return super().states(parts, ids, mask, policy=policy)[:, DROPPED:]

    def context(self, parts: Parts, states: Float[Array, "n s d"], mask: Bool[Array, "n s"]) -> Context:
        """The states, and which of them are no padding; the mask may still have the dropped tokens."""
        return states, mask[:, mask.shape[1] - states.shape[1] :]

    def guide(
        self, positive: Float32[Array, "b h w c"], negative: Float32[Array, "b h w c"], scale: float
    ) -> Float32[Array, "b h w c"]:
        """Classifier-free guidance, then for each patch the length of the caption's velocity, in float32."""
        rows, columns = positive.shape[1:3]
        wanted = transformer.patchify(positive)
        guided = transformer.patchify(super().guide(positive, negative, scale))
        length, own = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (wanted, guided))
        return transformer.unpatchify(guided * (length / own), rows, columns)

    def sigmas(self, steps: int, height: int, width: int, shift: float) -> Float[np.ndarray, " levels"]:
        """An exponential shift that depends on the number of tokens, stretched to a last level; `shift` is not read."""
        levels = shifted_levels(steps, self.shift.mu((height // self.cell) * (width // self.cell)))
        return stretched(levels, self.shift.shift_terminal)


def stretched(levels: Float[np.ndarray, " levels"], terminal: float) -> Float[np.ndarray, " levels"]:
    """Levels whose last one before 0 is `terminal`; a sampler of one step keeps its only level."""
    kept = 1 - levels[:-1]
    if kept[-1] == 0:
        return levels
    return np.append(1 - kept / (kept[-1] / np.float32(1 - terminal)), np.float32(0)).astype(np.float32)


def prompt_text(tokenizer: Any, caption: str) -> str:
    """A caption in the template of the pipeline, which is not the tokenizer's own."""
    turns = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
    return turns


def encoder_sizes(text: TextConfig) -> EncoderSizes:
    """All layers and the final norm."""
    return EncoderSizes(text, (text.layers,), final_norm=True)


def _vae_table(config: VAEConfig) -> Table:
    return Table(weights.vae_rules(config), vae.abstract_params(config), ignore=weights.TIME)


def _text_table(config: Qwen2_5VLConfig) -> Table:
    """Of the whole model: its image encoder is published too."""
    rules, abstract = qwen_weights.rules(config, projector=False), qwen.abstract_params(config)
    tied = r"|lm_head\.weight" if config.text.tied else ""
    return Table(rules, abstract, qwen_weights.ALIASES, qwen_weights.BUFFERS + tied)


def _read_table(config: Qwen2_5VLConfig) -> Table:
    table = encoder.read_table(encoder_sizes(config.text), qwen_weights.PREFIX, qwen_weights.ALIASES)
    return dataclasses.replace(table, ignore="|".join((table.ignore, VISION, qwen_weights.BUFFERS)))


def describe(
    folder: pathlib.Path, template: ConditionTemplate, *, dtype: str, remat: str, lora_alpha: float
) -> QwenImageDecoder:
    """See `models.decoder.Family`."""
    sizes = TransformerConfig.from_folder(folder / "transformer", dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    autoencoder = VAEConfig.from_folder(folder / "vae")
    read = encoder_sizes(qwen_config.from_folder(folder / "text_encoder", dtype=dtype).text)
    check_fit(
        folder / "transformer" / "config.json",
        sizes,
        {
            "joint_attention_dim": (read.width, "the width of text_encoder"),
            "out_channels": (autoencoder.channels, "the z_dim of vae"),
        },
    )
    if len(template.prefix) < DROPPED:
        raise ValueError(f"{folder / 'tokenizer'} makes {len(template.prefix)} tokens of a prefix of {DROPPED}")
    stored = check_scheduler(folder / "scheduler", use_dynamic_shifting=True, time_shift_type="exponential")
    names = [field.name for field in dataclasses.fields(Shift)]
    shift = Shift(**{name: stored[name] for name in names if stored.get(name) is not None})
    return QwenImageDecoder(sizes, autoencoder, template, read, shift)


def published(dtype: str, remat: str, lora_alpha: float) -> QwenImageDecoder:
    """Of Qwen/Qwen-Image and -2512: `SYSTEM` in its turn, and a space as the negative prompt."""
    sizes = TransformerConfig(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    before, after = TURNS
    whole = qwen_config.PUBLISHED["qwen2_5_vl_7b"]
    template = ConditionTemplate(before, after, (220,), whole.pad_token_id, most=MOST_TOKENS)
    read = encoder_sizes(whole.text.using(dtype=dtype))
    return QwenImageDecoder(sizes, VAEConfig(), template, read)


FAMILY = Family(
    name="Qwen-Image",
    pipeline="QwenImagePipeline",
    describe=describe,
    text=prompt_text,
    negative=" ",
    most=MOST_TOKENS,
    components={
        "transformer": transformer_part(QwenImageDecoder, TransformerConfig.from_folder, "transformer_qwenimage"),
        "vae": Component("vae", VAEConfig.from_folder, _vae_table),
        "text_encoder": Component("text_encoder", qwen_config.from_folder, _text_table, _read_table, stem="model"),
    },
    defaults=lambda folder: {"steps": 50, "guidance_scale": 4.0},
    published={"qwen_image": Published(published, "Qwen/Qwen-Image", "Apache-2.0")},
)
