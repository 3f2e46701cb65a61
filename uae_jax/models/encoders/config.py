"""Configurations of the encoders, read from the `config.json` that transformers writes."""

import dataclasses
import pathlib
import typing
from typing import Any

from uae_jax.files.json_files import read_json
from uae_jax.files.known_fields import WITHOUT_EFFECT, check_kinds, refuse_unknown, without_none
from uae_jax.files.paths import to_path

# beside what no model uses: which results transformers gives, and how DINOv3's positions vary in training
_NO_EFFECT = frozenset(
    """
    projection_dim logit_scale_init_value tie_word_embeddings return_loss stage_names out_features out_indices
    reshape_hidden_states pos_embed_shift pos_embed_jitter pos_embed_rescale
    """.split()
)


def _known_fields(cls: type, raw: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    what = f"{str(raw.get('model_type', 'encoder'))[:40]} config: "
    refuse_unknown(raw, names | WITHOUT_EFFECT | _NO_EFFECT, {"apply_layernorm": True}, what)
    known = {name: value for name, value in raw.items() if name in names and value is not None}
    for name in {"image_size", "patch_size"} & set(known):
        if isinstance(known[name], (list, tuple)):
            if len(set(map(str, known[name]))) != 1:
                raise ValueError(f"{name} {known[name]} is not square; only square images and patches are supported")
            known[name] = known[name][0]
    check_kinds(known, typing.get_type_hints(cls), what, _MAY_BE_ZERO)
    return known


# beside ids, what a model may be without
_MAY_BE_ZERO = ("pad_token_id", "bos_token_id", "eos_token_id", "num_register_tokens", "kept_positions")


def _expect_model_type(folder: str | pathlib.Path, raw: dict[str, Any], *expected: str) -> None:
    if raw.get("model_type") not in expected:
        found = raw.get("model_type", raw.get("_class_name"))
        raise ValueError(
            f"{to_path(folder) / 'config.json'}: the folder holds a {found!r} model, expected "
            f"{' or '.join(map(repr, expected))}; give the folder of that model"
        )


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The image tower (arXiv 2103.00020); fields and defaults of transformers' class of this name."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPVisionConfig":
        """From the dictionary of a `config.json`; missing fields have their defaults."""
        return cls(**_known_fields(cls, raw))

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "CLIPVisionConfig":
        """Of a CLIPVisionModelWithProjection folder, or the image tower of a CLIPModel folder.

        Raises:
          FileNotFoundError: no config.json.
          ValueError: it is of another model.
        """
        raw = read_json(folder)
        _expect_model_type(folder, raw, "clip_vision_model", "clip")
        return CLIPConfig.from_dict(raw).vision if raw["model_type"] == "clip" else cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` and transformers read."""
        return {"model_type": "clip_vision_model", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower (arXiv 2103.00020); fields and defaults of transformers' class of this name."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    bos_token_id: int = 49406
    eos_token_id: int = 49407

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPTextConfig":
        """From the dictionary of a `config.json`; missing fields have their defaults."""
        return cls(**_known_fields(cls, raw))

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "CLIPTextConfig":
        """Of a CLIPTextModelWithProjection folder, or the text tower of a CLIPModel folder.

        Raises:
          FileNotFoundError: no config.json.
          ValueError: it is of another model.
        """
        raw = read_json(folder)
        _expect_model_type(folder, raw, "clip_text_model", "clip")
        return CLIPConfig.from_dict(raw).text if raw["model_type"] == "clip" else cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` and transformers read."""
        return {"model_type": "clip_text_model", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class LongCLIPTextConfig(CLIPTextConfig):
    """The text tower of Long-CLIP, with two tables of positions (arXiv 2403.15378, section 3.1).

    Attributes:
      kept_positions: how many positions are CLIP's own, from the first table; the others are of the second.
    """

    max_position_embeddings: int = 248
    kept_positions: int = 20


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the initial logarithm of the logit scale (arXiv 2103.00020, section 2.5)."""

    vision: CLIPVisionConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CLIPConfig":
        """From the dictionary of a `config.json`.

        As in transformers: the width of both projections is the outer `projection_dim`, and the older
        `vision_config_dict` and `text_config_dict` win over `vision_config` and `text_config`.
        """
        inner = {f"{tower}_config{old}" for tower in ("vision", "text") for old in ("", "_dict")}
        refuse_unknown(raw, inner | WITHOUT_EFFECT | _NO_EFFECT, what="clip config: ")
        towers = {}
        for tower in ("vision", "text"):
            older = raw.get(f"{tower}_config_dict")
            nested = (raw.get(f"{tower}_config") or {}) if older is None else older
            nested = without_none(nested, f"{tower}_config")
            towers[tower] = {**nested, "projection_dim": raw.get("projection_dim") or 512}
        scale = raw.get("logit_scale_init_value", 2.6592)
        check_kinds({"logit_scale_init_value": scale}, {"logit_scale_init_value": float}, "clip config: ")
        return cls(CLIPVisionConfig.from_dict(towers["vision"]), CLIPTextConfig.from_dict(towers["text"]), scale)

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "CLIPConfig":
        """Of a CLIPModel folder.

        Raises:
          FileNotFoundError: no config.json.
          ValueError: it is of another model.
        """
        raw = read_json(folder)
        _expect_model_type(folder, raw, "clip")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary that `from_dict` and transformers read."""
        return {
            "model_type": "clip",
            "projection_dim": self.vision.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "vision_config": self.vision.to_dict(),
            "text_config": self.text.to_dict(),
        }


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """DINOv2 (arXiv 2304.07193); fields and defaults of transformers' class of this name."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: int | float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side of the position table."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        """Inner width of the feed-forward layer (gated: two thirds, rounded up to a multiple of 8)."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "Dinov2Config":
        """Of a Dinov2Model folder.

        Raises:
          FileNotFoundError: no config.json.
          ValueError: it is of another model.
        """
        raw = read_json(folder)
        _expect_model_type(folder, raw, "dinov2")
        return cls(**_known_fields(cls, raw))


@dataclasses.dataclass(frozen=True)
class Dinov3Config:
    """DINOv3 vision transformers (arXiv 2508.10104); fields and defaults of transformers' DINOv3ViTConfig."""

    patch_size: int = 16
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    image_size: int = 224
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    layerscale_value: float = 1.0
    use_gated_mlp: bool = False
    num_register_tokens: int = 0

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "Dinov3Config":
        """Of a DINOv3ViTModel folder.

        Raises:
          FileNotFoundError: no config.json.
          ValueError: it is of another model.
        """
        raw = read_json(folder)
        _expect_model_type(folder, raw, "dinov3_vit")
        return cls(**_known_fields(cls, raw))
