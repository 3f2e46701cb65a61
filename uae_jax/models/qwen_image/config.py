"""Sizes of Qwen-Image's transformer and auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
import typing
from typing import Any

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import check_kinds, refuse_unknown, require
from uae_jax.files.paths import to_path
from uae_jax.models.language.config import check_choices

TRANSFORMER, VAE = "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"
OURS = ("lora_alpha", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
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
      lora_alpha: numerator of the adapters' scale; not part of the published file.
      dtype: precision of the products, `float32` or `bfloat16`; not part of the published file.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        fixed = {"patch_size": 2, "guidance_embeds": False, "in_channels": 4 * self.out_channels}
        for field, supported in fixed.items():
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        axes, head = self.axes_dims_rope, self.attention_head_dim
        fits = len(axes) == 3 and sum(axes) == head and not any(width % 2 for width in axes)
        wanted = f"three even widths whose sum is attention_head_dim, {head}"
        require(fits, "transformer", "axes_dims_rope", axes, wanted)
        check_choices(self.dtype, self.remat)

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> "TransformerConfig":
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, TRANSFORMER)
        values = {
            field.name: stored.get(field.name, field.default)
            for field in dataclasses.fields(cls)
            if field.name not in OURS
        }
        what = f"{to_path(path) / 'config.json'}: "
        # published configs name a width that the model does not read
        refuse_unknown(stored, {*values, "pooled_projection_dim"}, what=what)
        check_kinds(values, typing.get_type_hints(cls), what)
        values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
        return cls(**{**values, **overrides})

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in OURS}
        return {"_class_name": TRANSFORMER, **values, "axes_dims_rope": list(self.axes_dims_rope)}


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
        stored, what = read_class_json(path, VAE), f"{to_path(path) / 'config.json'}: "
        names = [field.name for field in dataclasses.fields(cls)]
        values = {field.name: stored.get(field.name, field.default) for field in dataclasses.fields(cls)}
        require(not stored.get("attn_scales"), "VAE", "attn_scales", stored.get("attn_scales"), "empty")
        # what is about time does not matter to a single image
        refuse_unknown(stored, {*names, "temperal_downsample", "attn_scales"}, {"dropout": 0.0}, what=what)
        check_kinds(values, typing.get_type_hints(cls), what)
        tuples = ("dim_mult", "latents_mean", "latents_std")
        values |= {name: tuple(values[name]) for name in tuples}
        return cls(**values)
