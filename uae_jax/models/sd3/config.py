"""Sizes of the diffusion transformer and of the auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import require
from uae_jax.models.autoencoder.config import KLFields, block_types, check_fixed
from uae_jax.models.config_fields import TransformerFields, read_fields

VAE = "AutoencoderKL"


@dataclasses.dataclass(frozen=True)
class VAEConfig(KLFields):
    """AutoencoderKL without quantisation convolutions (SD3's; arXiv 2403.03206, section 2.1 and table 3).

    Attributes:
      scaling_factor: scale of `to_model_latents`.
      shift_factor: shift of `to_model_latents`.
      sample_size: image side of the original training; only kept for export.
    """

    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    sample_size: int = 1024

    @property
    def downsampling(self) -> int:
        """Image side divided by latent side."""
        return self.sizes.downsampling

    @property
    def channels(self) -> int:
        """C of the latents `[B, h, w, C]`."""
        return self.latent_channels

    @classmethod
    def from_folder(cls, path: str | pathlib.Path) -> "VAEConfig":
        """Reads a diffusers `config.json`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, VAE)
        fixed = {
            "act_fn": ("silu", "silu"),
            "use_quant_conv": (True, False),
            "use_post_quant_conv": (True, False),
            "latents_mean": (None, None),
            "latents_std": (None, None),
        } | block_types(stored, (64,))
        check_fixed(stored, fixed)
        absent = {
            "block_out_channels": (64,),
            "layers_per_block": 1,
            "latent_channels": 4,
            "sample_size": 32,
            "scaling_factor": 0.18215,
        }
        stored = stored | {"shift_factor": stored.get("shift_factor") or 0.0}
        return cls(**read_fields(cls, path, stored, absent=absent, unread={*fixed, "force_upcast"}))

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        blocks = len(self.block_out_channels)
        return {
            "_class_name": VAE,
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
class TransformerConfig(TransformerFields):
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

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    published_class: ClassVar[str] = "SD3Transformer2DModel"
    absent: ClassVar[Mapping[str, Any]] = {
        "num_layers": 18,
        "num_attention_heads": 18,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (),
        "qk_norm": None,
    }
    unread: ClassVar[tuple[str, ...]] = ("caption_projection_dim",)

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

    def __post_init__(self):
        super().__post_init__()
        name = "transformer"
        require(self.num_layers >= 1, name, "num_layers", self.num_layers, "at least 1")
        require(self.qk_norm in (None, "rms_norm"), name, "qk_norm", self.qk_norm, "None or 'rms_norm'")
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
    def completed(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """The velocity has as many channels as the latents where the file says nothing of them."""
        if "out_channels" in stored and stored["out_channels"] is None:
            return stored | {"out_channels": stored.get("in_channels", cls.in_channels)}
        return stored

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> Self:
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        config = super().from_folder(path, **overrides)
        name = "caption_projection_dim"
        projection = read_class_json(path, cls.published_class).get(name, 1152)
        wanted = f"the model's width {config.width}"
        require(projection == config.width, "transformer", name, projection, wanted)
        return config

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        return {**super().published(), "caption_projection_dim": self.width}
