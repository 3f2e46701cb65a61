"""Sizes of the diffusion transformer and of the auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
import typing
from typing import Any

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import check_kinds, refuse_unknown, require
from uae_jax.files.paths import to_path
from uae_jax.models.autoencoder.blocks import Sizes
from uae_jax.nn.remat import POLICIES


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """AutoencoderKL without quantisation convolutions (SD3's; arXiv 2403.03206, section 2.1 and table 3).

    Attributes:
      in_channels: channels of the image that the encoder reads.
      out_channels: channels of the image that the decoder makes.
      latent_channels: C of the latents `[B, h, w, C]`.
      block_out_channels: width of each resolution; each step between two halves height and width.
      layers_per_block: residual blocks a resolution in the encoder; the decoder has one more.
      norm_num_groups: groups of every group norm.
      mid_block_add_attention: whether the lowest resolution has self-attention.
      scaling_factor: scale of `to_model_latents`.
      shift_factor: shift of `to_model_latents`.
      sample_size: image side of the original training; only kept for export.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    sample_size: int = 1024

    def __post_init__(self):
        divisible = all(width % self.norm_num_groups == 0 for width in self.block_out_channels)
        require(
            bool(self.block_out_channels) and divisible,
            "VAE",
            "block_out_channels",
            self.block_out_channels,
            f"at least one width, each a multiple of norm_num_groups={self.norm_num_groups}",
        )
        require(self.layers_per_block >= 1, "VAE", "layers_per_block", self.layers_per_block, "at least 1")

    @property
    def downsampling(self) -> int:
        """Image side divided by latent side."""
        return self.sizes.downsampling

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
        stored = read_class_json(path, "AutoencoderKL")
        widths = stored.get("block_out_channels", (64,))
        blocks = len(widths) if isinstance(widths, list | tuple) else 0  # another kind is refused below
        fixed = {
            "act_fn": ("silu", "silu"),
            "use_quant_conv": (True, False),
            "use_post_quant_conv": (True, False),
            "latents_mean": (None, None),
            "latents_std": (None, None),
            "down_block_types": (("DownEncoderBlock2D",), ("DownEncoderBlock2D",) * blocks),
            "up_block_types": (("UpDecoderBlock2D",), ("UpDecoderBlock2D",) * blocks),
        }
        for field, (default, supported) in fixed.items():
            value = stored.get(field, default)
            value = tuple(value) if isinstance(value, list) else value
            require(value == supported, "VAE", field, value, repr(supported))
        names = {field.name for field in dataclasses.fields(cls)}
        refuse_unknown(stored, {*names, *fixed, "force_upcast"}, what=f"{to_path(path) / 'config.json'}: ")
        absent = {
            "block_out_channels": (64,),
            "layers_per_block": 1,
            "latent_channels": 4,
            "sample_size": 32,
            "scaling_factor": 0.18215,
            "shift_factor": None,
        }
        values = {
            field.name: stored.get(field.name, absent.get(field.name, field.default))
            for field in dataclasses.fields(cls)
        }
        values["shift_factor"] = values["shift_factor"] or 0.0
        check_kinds(values, typing.get_type_hints(cls), f"{to_path(path) / 'config.json'}: ")
        values["block_out_channels"] = tuple(values["block_out_channels"])
        return cls(**values)

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        blocks = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "force_upcast": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
            **dataclasses.asdict(self),
            "block_out_channels": list(self.block_out_channels),
        }


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """SD3Transformer2DModel (arXiv 2403.03206, section 4), with the dual-attention blocks of SD3.5 medium.

    The defaults are SD3.5 medium.

    Attributes:
      sample_size: latent side of the original training; sets the unit of the position table.
      patch_size: side of a latent patch.
      in_channels: channels of the latents.
      out_channels: channels of the velocity.
      num_layers: blocks, the last of which does not update the context.
      attention_head_dim: K, width of a head.
      num_attention_heads: H; the model's width D is H * K.
      joint_attention_dim: Dc, width of the text context.
      pooled_projection_dim: Dp, width of the pooled text vector.
      pos_embed_max_size: side of the position table in patches; no latent may have more patches a side.
      dual_attention_layers: blocks with a second attention over image tokens only.
      qk_norm: None or `rms_norm`, the norm of queries and keys.
      lora_alpha: numerator of the adapters' scale; not part of the published file.
      dtype: precision of the products, `float32` or `bfloat16`; not part of the published file.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = tuple(range(13))
    qk_norm: str | None = "rms_norm"
    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        name = "transformer"
        require(self.num_layers >= 1, name, "num_layers", self.num_layers, "at least 1")
        require(self.qk_norm in (None, "rms_norm"), name, "qk_norm", self.qk_norm, "None or 'rms_norm'")
        require(self.remat in POLICIES, name, "remat", self.remat, f"one of {tuple(POLICIES)}")
        require(self.dtype in ("float32", "bfloat16"), name, "dtype", self.dtype, "'float32' or 'bfloat16'")
        require(
            self.width % 4 == 0,
            name,
            "attention_head_dim",
            self.attention_head_dim,
            "such that num_attention_heads * attention_head_dim is a multiple of 4",
        )
        inside = all(0 <= layer < self.num_layers for layer in self.dual_attention_layers)
        require(inside, name, "dual_attention_layers", self.dual_attention_layers, f"numbers below {self.num_layers}")

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def runs(self) -> tuple[tuple[str, tuple[int, ...], bool], ...]:
        """The scanned groups of equal blocks, without the last block: (name, layer numbers, dual attention)."""
        groups: list[tuple[list[int], bool]] = []
        for layer in range(self.num_layers - 1):
            dual = layer in self.dual_attention_layers
            if groups and groups[-1][1] == dual:
                groups[-1][0].append(layer)
            else:
                groups.append(([layer], dual))
        return tuple((f"blocks_{number}", tuple(layers), dual) for number, (layers, dual) in enumerate(groups))

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> "TransformerConfig":
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, "SD3Transformer2DModel")
        absent = {
            "num_layers": 18,
            "num_attention_heads": 18,
            "pos_embed_max_size": 96,
            "dual_attention_layers": (),
            "qk_norm": None,
        }
        ours = ("lora_alpha", "dtype", "remat")
        values = {
            field.name: stored.get(field.name, absent.get(field.name, field.default))
            for field in dataclasses.fields(cls)
            if field.name not in ours
        }
        refuse_unknown(stored, {*values, "caption_projection_dim"}, what=f"{to_path(path) / 'config.json'}: ")
        values["out_channels"] = values["in_channels"] if values["out_channels"] is None else values["out_channels"]
        check_kinds(values, typing.get_type_hints(cls), f"{to_path(path) / 'config.json'}: ")
        values["dual_attention_layers"] = tuple(values["dual_attention_layers"])
        config = cls(**{**values, **overrides})
        projection = stored.get("caption_projection_dim", 1152)
        require(
            projection == config.width,
            "transformer",
            "caption_projection_dim",
            projection,
            f"the model's width {config.width}",
        )
        return config

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        values = {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("lora_alpha", "dtype", "remat")
        }
        return {
            "_class_name": "SD3Transformer2DModel",
            **values,
            "caption_projection_dim": self.width,
            "dual_attention_layers": list(self.dual_attention_layers),
        }
