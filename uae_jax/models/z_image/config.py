"""Sizes of Z-Image's transformer, as diffusers writes them in `config.json`."""

import dataclasses
import pathlib
import typing
from typing import Any

from uae_jax.files.json_files import read_class_json
from uae_jax.files.known_fields import check_kinds, refuse_unknown, require
from uae_jax.files.paths import to_path
from uae_jax.models.language.config import check_choices

CLASS = "ZImageTransformer2DModel"
CONDITIONING = 256  # width of the embedding of the noise level, at most
OURS = ("lora_alpha", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
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
      lora_alpha: numerator of the adapters' scale; not part of the published file.
      dtype: precision of the products, `float32` or `bfloat16`; not part of the published file.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.

    Raises:
      ValueError: a value that the modules do not support; the message names the field.
    """

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
    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        fixed = {"all_patch_size": (2,), "all_f_patch_size": (1,), "qk_norm": True, "t_scale": 1000.0}
        for field, supported in (fixed | {"n_kv_heads": self.n_heads}).items():
            require(getattr(self, field) == supported, "transformer", field, getattr(self, field), repr(supported))
        require(self.dim % self.n_heads == 0, "transformer", "dim", self.dim, f"a multiple of n_heads={self.n_heads}")
        axes, head = self.axes_dims, self.dim // self.n_heads
        fits = len(axes) == 3 and sum(axes) == head and not any(width % 2 for width in axes)
        require(fits, "transformer", "axes_dims", axes, f"three even widths whose sum is dim / n_heads, {head}")
        require(len(self.axes_lens) == 3, "transformer", "axes_lens", self.axes_lens, "three lengths")
        check_choices(self.dtype, self.remat)

    @property
    def width(self) -> int:
        """D."""
        return self.dim

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
    def mlp_width(self) -> int:
        """Inner width of the gated MLPs."""
        return int(self.dim / 3 * 8)

    @classmethod
    def from_folder(cls, path: str | pathlib.Path, **overrides: Any) -> "TransformerConfig":
        """Reads a diffusers `config.json`; `overrides` set fields such as `dtype`, `remat` and `lora_alpha`.

        Raises:
          FileNotFoundError: there is no config.json.
          ValueError: another model, or a field with an unsupported value.
        """
        stored = read_class_json(path, CLASS)
        absent = {"axes_lens": (1024, 512, 512)}
        values = {
            field.name: stored.get(field.name, absent.get(field.name, field.default))
            for field in dataclasses.fields(cls)
            if field.name not in OURS
        }
        what = f"{to_path(path) / 'config.json'}: "
        refuse_unknown(stored, values, what=what)
        check_kinds(values, typing.get_type_hints(cls), what)
        values |= {
            name: tuple(values[name]) for name in ("all_patch_size", "all_f_patch_size", "axes_dims", "axes_lens")
        }
        return cls(**{**values, **overrides})

    def published(self) -> dict[str, Any]:
        """The contents of the diffusers `config.json` of this model."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in OURS}
        return {
            "_class_name": CLASS,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "siglip_feat_dim": None,
        }
