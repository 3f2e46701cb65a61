"""Sizes of Qwen-Image's transformer and auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
from typing import ClassVar

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import require
from uae_jax.models.config_fields import TransformerFields, check_axes, read_fields

VAE = "AutoencoderKLQwenImage"


@dataclasses.dataclass(frozen=True)
class TransformerConfig(TransformerFields):
    """QwenImageTransformer2DModel. The defaults are Qwen-Image.

    Attributes:
      patch_size: side of a patch of latents: 2.
      in_channels: numbers of a patch.
      out_channels: channels of the velocity.
      num_layers: blocks with two streams.
      attention_head_dim: K, width of a head.
      num_attention_heads: H; the model's width D is H * K.
      joint_attention_dim: width of the text encoder's states.
      guidance_embeds: whether the guidance is embedded: never.
      axes_dims_rope: numbers of a head that turn with each of the three axes.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    published_class: ClassVar[str] = "QwenImageTransformer2DModel"
    # published configs name a width that the model does not read
    unread: ClassVar[tuple[str, ...]] = ("pooled_projection_dim",)

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        super().__post_init__()
        fixed = {"patch_size": 2, "guidance_embeds": False, "in_channels": 4 * self.out_channels}
        for field, supported in fixed.items():
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        check_axes("axes_dims_rope", self.axes_dims_rope, 3, self.attention_head_dim, "attention_head_dim")

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKLQwenImage, a causal auto-encoder of videos, for single images.

    Attributes:
      base_dim: width of the first resolution.
      z_dim: channels of the latents.
      dim_mult: width of each resolution over the first; each step between two halves height and width.
      num_res_blocks: residual blocks a resolution in the encoder; the decoder has one more.
      latents_mean, latents_std: of each channel, for `to_model_latents`.
      input_channels: of the images.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[float, ...] = (1.0,) * 16
    input_channels: int = 3

    def __post_init__(self):
        for field in ("latents_mean", "latents_std"):
            value = getattr(self, field)
            require(len(value) == self.z_dim, "VAE", field, value, f"z_dim={self.z_dim} numbers")
        require(all(value > 0 for value in self.latents_std), "VAE", "latents_std", self.latents_std, "above 0")
        require(bool(self.dim_mult), "VAE", "dim_mult", self.dim_mult, "at least one factor")

    @property
    def downsampling(self) -> int:
        """Image side divided by latent side."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.z_dim

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """Width of each resolution."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @classmethod
    def from_folder(cls, path: str | pathlib.Path) -> "VAEConfig":
        """Reads a diffusers `config.json`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, VAE)
        require(not stored.get("attn_scales"), "VAE", "attn_scales", stored.get("attn_scales"), "empty")
        # what is about time does not matter to a single image
        unread = ("temperal_downsample", "attn_scales")
        return cls(**read_fields(cls, path, stored, unread=unread, usual={"dropout": 0.0}))
