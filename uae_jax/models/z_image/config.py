"""Sizes of Z-Image's transformer, as diffusers writes them in `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from uae_jax.files.known_fields import require
from uae_jax.models.config_fields import TransformerFields, check_axes

CONDITIONING = 256  # width of the embedding of the noise level, at most


@dataclasses.dataclass(frozen=True)
class TransformerConfig(TransformerFields):
    """ZImageTransformer2DModel with patches of 2 x 2 latents. The defaults are the published ones.

    Attributes:
      all_patch_size: sides of a patch: (2,); all_f_patch_size: frames of one: (1,).
      in_channels: channels of the latents.
      dim: D, the model's width.
      n_layers: blocks over image and text.
      n_refiner_layers: blocks over the image alone, and as many over the text alone, in front of them.
      n_heads, n_kv_heads: heads of queries and of keys, which are as many.
      norm_eps: of the RMS norms of blocks and text.
      qk_norm: whether queries and keys have an RMS norm: always.
      cap_feat_dim: width of the text encoder's states.
      rope_theta: base of the rotary frequencies.
      t_scale: factor of the time: 1000.
      axes_dims: numbers of a head that turn with each of the three axes.
      axes_lens: positions of each axis.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

    published_class: ClassVar[str] = "ZImageTransformer2DModel"
    absent: ClassVar[Mapping[str, Any]] = {"axes_lens": (1024, 512, 512)}

    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    def __post_init__(self):
        super().__post_init__()
        fixed = {"all_patch_size": (2,), "all_f_patch_size": (1,), "qk_norm": True, "t_scale": 1000.0}
        for field, supported in (fixed | {"n_kv_heads": self.n_heads}).items():
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        require(self.dim % self.n_heads == 0, "transformer", "dim", self.dim, f"a multiple of n_heads={self.n_heads}")
        check_axes("axes_dims", self.axes_dims, 3, self.dim // self.n_heads, "dim / n_heads")
        require(len(self.axes_lens) == 3, "transformer", "axes_lens", self.axes_lens, "three lengths")

    @property
    def width(self) -> int:
        """D."""
        return self.dim

    @property
    def patch_size(self) -> int:
        """Side of a patch of the latents."""
        return self.all_patch_size[0]

    @property
    def num_layers(self) -> int:
        """Blocks over image and text."""
        return self.n_layers

    @property
    def joint_attention_dim(self) -> int:
        """Width of the text encoder's states."""
        return self.cap_feat_dim

    @property
    def patch_channels(self) -> int:
        """Numbers of a patch."""
        return 4 * self.in_channels

    @property
    def alive(self) -> float:
        """Gate, values and product of the gated MLP, and twice the stream."""
        return 2 + 3 * self.mlp_width / self.dim

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLPs."""
        return int(self.dim / 3 * 8)

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        return {**super().published(), "siglip_feat_dim": None}
