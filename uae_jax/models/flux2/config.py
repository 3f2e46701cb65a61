"""Sizes of FLUX.2-klein's transformer and auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
import typing
from typing import Any

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import check_kinds, refuse_unknown, require
from uae_jax.files.paths import to_path
from uae_jax.models.autoencoder.blocks import Sizes
from uae_jax.models.language.config import check_choices

TRANSFORMER, VAE = "Flux2Transformer2DModel", "AutoencoderKLFlux2"
OURS = ("lora_alpha", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Flux2Transformer2DModel without an embedding of the guidance. The defaults are klein-4B.

    Attributes:
      patch_size: side of a patch of the latents, which the auto-encoder has already made of patches: 1.
      in_channels: channels of the latents.
      out_channels: channels of the velocity.
      num_layers: blocks with two streams.
      num_single_layers: blocks with one stream behind them.
      attention_head_dim: K, width of a head.
      num_attention_heads: H; the model's width D is H * K.
      joint_attention_dim: width of the text encoder's states.
      timestep_guidance_channels: features of a noise level: 256.
      mlp_ratio: inner width of the gated MLPs over D.
      axes_dims_rope: numbers of a head that turn with each of the four axes.
      rope_theta: base of the rotary frequencies.
      eps: of all norms.
      guidance_embeds: whether the guidance is embedded: never.
      lora_alpha: numerator of the adapters' scale; not part of the published file.
      dtype: precision of the products, `float32` or `bfloat16`; not part of the published file.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = False
    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        for field, supported in (("patch_size", 1), ("guidance_embeds", False), ("timestep_guidance_channels", 256)):
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        same = self.out_channels in (None, self.in_channels)
        require(same, "transformer", "out_channels", self.out_channels, f"in_channels, {self.in_channels}")
        axes = self.axes_dims_rope
        fits = len(axes) == 4 and sum(axes) == self.attention_head_dim and not any(width % 2 for width in axes)
        wanted = f"four even widths whose sum is attention_head_dim, {self.attention_head_dim}"
        require(fits, "transformer", "axes_dims_rope", axes, wanted)
        check_choices(self.dtype, self.remat)

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLPs."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> "TransformerConfig":
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, TRANSFORMER)
        absent = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360}
        absent |= {"guidance_embeds": True}
        values = {
            field.name: stored.get(field.name, absent.get(field.name, field.default))
            for field in dataclasses.fields(cls)
            if field.name not in OURS
        }
        what = f"{to_path(path) / 'config.json'}: "
        refuse_unknown(stored, values, what=what)
        check_kinds(values, typing.get_type_hints(cls), what, zero=("num_layers", "num_single_layers"))
        values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
        return cls(**{**values, **overrides})

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in OURS}
        return {"_class_name": TRANSFORMER, **values, "axes_dims_rope": list(self.axes_dims_rope)}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKLFlux2: latents of 2 x 2 patches, normalised by the statistics of a batch norm.

    Attributes:
      in_channels, out_channels: of the images.
      latent_channels: that encoder and decoder know; a patch has four times as many.
      block_out_channels: width of each resolution; each step between two halves height and width.
      layers_per_block: residual blocks a resolution in the encoder; the decoder has one more.
      norm_num_groups: groups of every group norm.
      mid_block_add_attention: whether the lowest resolution has self-attention.
      batch_norm_eps: added to the variances of `to_model_latents`.
      patch_size: sides of a patch of the latents: (2, 2).
      sample_size: image side of the original training; only kept for export.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (2, 2)
    sample_size: int = 1024

    def __post_init__(self):
        require(self.patch_size == (2, 2), "VAE", "patch_size", self.patch_size, "(2, 2)")
        divisible = all(width % self.norm_num_groups == 0 for width in self.block_out_channels)
        require(
            bool(self.block_out_channels) and divisible,
            "VAE",
            "block_out_channels",
            self.block_out_channels,
            f"at least one width, each a multiple of norm_num_groups={self.norm_num_groups}",
        )

    @property
    def downsampling(self) -> int:
        """Image side divided by the side of the latents, patches included."""
        return 2 * self.sizes.downsampling

    @property
    def channels(self) -> int:
        """Of a patch of the latents."""
        return 4 * self.latent_channels

    @property
    def sizes(self) -> Sizes:
        """Of encoder and decoder; the encoder makes mean and log-variance of each latent channel."""
        return Sizes(
            self.block_out_channels,
            self.layers_per_block,
            self.norm_num_groups,
            2 * self.latent_channels,
            self.latent_channels,
            channels=self.out_channels,
            middle_attention=self.mid_block_add_attention,
        )

    @classmethod
    def from_folder(cls, path: str | pathlib.Path) -> "VAEConfig":
        """Reads a diffusers `config.json`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, VAE)
        values = {field.name: stored.get(field.name, field.default) for field in dataclasses.fields(cls)}
        what = f"{to_path(path) / 'config.json'}: "
        check_kinds(values, typing.get_type_hints(cls), what)
        blocks = len(values["block_out_channels"])
        fixed = {
            "act_fn": "silu",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            "decoder_block_out_channels": None,
        }
        for field, supported in fixed.items():
            value = stored.get(field, supported)
            value = list(value) if isinstance(value, tuple) else value
            require(value == supported, "VAE", field, value, repr(supported))
        refuse_unknown(stored, {*values, *fixed, "batch_norm_momentum", "force_upcast"}, what=what)
        values |= {name: tuple(values[name]) for name in ("block_out_channels", "patch_size")}
        return cls(**values)
