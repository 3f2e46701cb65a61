"""Sizes of FLUX.2-klein's transformer and auto-encoder, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import require
from uae_jax.models.autoencoder.config import KLFields, block_types, check_fixed
from uae_jax.models.config_fields import TransformerFields, check_axes, read_fields

VAE = "AutoencoderKLFlux2"


@dataclasses.dataclass(frozen=True)
class TransformerConfig(TransformerFields):
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

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    published_class: ClassVar[str] = "Flux2Transformer2DModel"
    absent: ClassVar[Mapping[str, Any]] = {
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "guidance_embeds": True,
    }
    zero: ClassVar[tuple[str, ...]] = ("num_layers", "num_single_layers")

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

    def __post_init__(self):
        super().__post_init__()
        for field, supported in (("patch_size", 1), ("guidance_embeds", False), ("timestep_guidance_channels", 256)):
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        same = self.out_channels in (None, self.in_channels)
        require(same, "transformer", "out_channels", self.out_channels, f"in_channels, {self.in_channels}")
        check_axes("axes_dims_rope", self.axes_dims_rope, 4, self.attention_head_dim, "attention_head_dim")

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def alive(self) -> float:
        """The fused map of a block with one stream, queries and keys in float32, what attention and MLP make, and
        the stream.
        """
        return 3 + 2 * self.mlp_ratio + 4 + 1 + self.mlp_ratio + 1

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLPs."""
        return int(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class VAEConfig(KLFields):
    """AutoencoderKLFlux2: latents of 2 x 2 patches, normalised by the statistics of a batch norm.

    Attributes:
      latent_channels: that encoder and decoder know; a patch has four times as many.
      batch_norm_eps: added to the variances of `to_model_latents`.
      patch_size: sides of a patch of the latents: (2, 2).
      sample_size: image side of the original training; only kept for export.
    """

    latent_channels: int = 32
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, int] = (2, 2)
    sample_size: int = 1024

    def __post_init__(self):
        super().__post_init__()
        require(self.patch_size == (2, 2), "VAE", "patch_size", self.patch_size, "(2, 2)")

    @property
    def downsampling(self) -> int:
        """Image side divided by the side of the latents, patches included."""
        return 2 * self.sizes.downsampling

    @property
    def channels(self) -> int:
        """Of a patch of the latents."""
        return 4 * self.latent_channels

    @classmethod
    def from_folder(cls, path: str | pathlib.Path) -> "VAEConfig":
        """Reads a diffusers `config.json`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, VAE)
        one: dict[str, Any] = dict(act_fn="silu", use_quant_conv=True, use_post_quant_conv=True)
        one |= {"decoder_block_out_channels": None}
        one |= {name: kinds for name, (_, kinds) in block_types(stored, cls.block_out_channels).items()}
        check_fixed(stored, {name: (value, value) for name, value in one.items()})
        return cls(**read_fields(cls, path, stored, unread={*one, "batch_norm_momentum", "force_upcast"}))
