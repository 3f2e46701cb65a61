"""Sizes of Janus-Pro (arXiv 2501.17811), read from the `config.json` of transformers or of the official release.

Both files leave out what has its default. Those defaults are those of the libraries, and stand here.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from uae_jax.files.json_files import read_json
from uae_jax.files.known_fields import WITHOUT_EFFECT, check_kinds, only, refuse_unknown, without_none
from uae_jax.files.paths import to_path
from uae_jax.models.autoencoder.blocks import Sizes
from uae_jax.models.janus.official import HF, as_hf
from uae_jax.models.language.config import TEXT_KINDS, TextConfig, text_sizes

OFFICIAL = "multi_modality"  # model_type of the official layout; that of transformers is `HF`
# the special tokens by what they are for; their ids differ between releases
TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "image": "<image_placeholder>",
    "begin_image": "<begin_of_image>",
    "end_image": "<end_of_image>",
}
GROUPS = 32  # of every group norm of the image tokenizer
# of LlamaConfig, JanusVisionConfig and JanusVQVAEConfig in transformers
_LLAMA = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
)
_VISION = dict(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_channels=3,
    image_size=384,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    mlp_ratio=4.0,
    projection_dim=2048,
    num_image_tokens=576,
)
_VQ = dict(
    embed_dim=8,
    num_embeddings=16384,
    latent_channels=256,
    in_channels=3,
    base_channels=128,
    channel_multiplier=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    out_channels=3,
    projection_dim=2048,
    hidden_act="gelu",
    image_token_embed_dim=2048,
)
# of the sections; values at which further fields have no effect
_IN_TEXT = frozenset((*_LLAMA, *TEXT_KINDS, "rope_scaling", "rope_parameters", "max_position_embeddings", "hidden_act"))
_IN_TEXT -= {"layer_types"}
_USUAL = {
    "vision_config.": {"attention_bias": True, "depth": 2},
    "vq_config.": {"num_hidden_layers": 2, "depth": 2},
}
_DROPOUT = frozenset(("hidden_dropout_rate", "projection_dropout", "dropout"))
_VISION_KINDS = dict.fromkeys(
    """
    hidden_size num_hidden_layers num_attention_heads num_channels image_size patch_size projection_dim num_image_tokens
    """.split(),
    int,
) | {"layer_norm_eps": float, "mlp_ratio": float, "hidden_act": str}
_VQ_KINDS = dict.fromkeys(
    """
    embed_dim num_embeddings latent_channels in_channels base_channels num_res_blocks num_patches out_channels
    projection_dim image_token_embed_dim
    """.split(),
    int,
) | {"channel_multiplier": tuple[int, ...], "hidden_act": str}
_IDS = {"image_token_id": int, "pad_token_id": int, "eos_token_id": int | tuple[int, ...], "bos_token_id": int}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP's image tower (arXiv 2303.15343), which reads the images that are captioned.

    Attributes:
      hidden_size: width of the blocks.
      intermediate_size: inner width of the feed-forward.
      num_hidden_layers: number of blocks.
      num_attention_heads: attention heads.
      num_channels: colour channels.
      image_size: side of the images in pixels.
      patch_size: side of a patch in pixels.
      hidden_act: activation of the feed-forward.
      layer_norm_eps: epsilon of the layer norms.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Embeddings of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """The image tokenizer (VQ-16 of LlamaGen, arXiv 2406.06525), whose tokens are drawn.

    Attributes:
      codes: rows of the codebook.
      code_width: width of a code.
      latent: channels between codes and convolutions.
      base: width of the highest resolution.
      multipliers: of `base`, for each resolution.
      layers: residual blocks a resolution in the encoder.
      channels: colour channels.
      grid: side of the square of tokens of an image.
    """

    codes: int = 16384
    code_width: int = 8
    latent: int = 256
    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    layers: int = 2
    channels: int = 3
    grid: int = 24

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return self.grid**2

    @property
    def sizes(self) -> Sizes:
        """Of encoder and decoder."""
        widths = tuple(self.base * factor for factor in self.multipliers)
        return Sizes(
            widths, self.layers, GROUPS, self.latent, self.latent, channels=self.channels, lowest_attention=True
        )

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.grid * self.sizes.downsampling


def _text_1b() -> TextConfig:
    return TextConfig(
        vocab_size=102400,
        width=2048,
        layers=24,
        heads=16,
        key_heads=16,
        mlp_width=5632,
        rope_theta=1e4,
        mrope_section=(64, 0, 0),
        tied=False,
        qkv_bias=False,
    )


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """The complete model; the defaults are Janus-Pro-1B.

    The aligners map to the width of the language model, and have that inner width.

    Attributes:
      text: the language model, Llama's.
      vision: the image tower of captioning.
      vq: the image tokenizer of drawing.
      image_token_id: token whose embeddings are replaced by those of an image.
      bos_token_id: first token of every prompt.
      pad_token_id: fills the unconditional prompt, and is written after the end of a caption.
      stop_token_ids: tokens that end a caption.
    """

    text: TextConfig = dataclasses.field(default_factory=_text_1b)
    vision: VisionConfig = VisionConfig()
    vq: VQConfig = VQConfig()
    image_token_id: int = 100581
    bos_token_id: int = 100000
    pad_token_id: int = 100002
    stop_token_ids: tuple[int, ...] = (100001,)

    def __post_init__(self):
        """Raises ValueError when sizes do not fit each other."""
        text, vision, vq = self.text, self.vision, self.vq
        text.check()
        for width, heads, what in (
            (vision.hidden_size, vision.num_attention_heads, "vision_config.hidden_size and num_attention_heads"),
            (vision.image_size, vision.patch_size, "vision_config.image_size and patch_size"),
        ):
            if width % heads:
                raise ValueError(f"{what} are {width} and {heads}; the first must be a multiple of the second")
        if not vq.multipliers or any(width % GROUPS or not width for width in vq.sizes.widths):
            raise ValueError(f"vq_config has widths {vq.sizes.widths}; each must be a multiple of {GROUPS}")
        if vq.image_size != vision.image_size or vq.channels != vision.num_channels:
            raise ValueError(
                f"vq_config draws images of {vq.image_size} pixels and {vq.channels} channels, vision_config reads "
                f"{vision.image_size} and {vision.num_channels}; both must agree"
            )
        for name in ("image_token_id", "bos_token_id", "pad_token_id"):
            if not 0 <= getattr(self, name) < text.vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}; the vocabulary has {text.vocab_size} tokens")

    def using(
        self, *, dtype: str | None = None, remat: str | None = None, lora_alpha: float | None = None
    ) -> "JanusConfig":
        """The same sizes with other precision, recomputation or adapter scale; None keeps a setting.

        Raises:
          ValueError: unknown `dtype` or `remat`.
        """
        return dataclasses.replace(self, text=self.text.using(dtype=dtype, remat=remat, lora_alpha=lora_alpha))


# Janus-1.3B has the sizes of the first, and other ids
SIZES = {
    "janus_pro_1b": JanusConfig(),
    "janus_pro_7b": JanusConfig(
        text=dataclasses.replace(_text_1b(), width=4096, layers=30, heads=32, key_heads=32, mlp_width=11008)
    ),
}


def from_folder(
    path: str | pathlib.Path, *, dtype: str = "float32", remat: str = "none", lora_alpha: float = 64.0
) -> JanusConfig:
    """Reads `config.json` of either layout, and the ids of the special tokens in `tokenizer.json` beside it.

    Args:
      path: the model's folder.
      dtype: precision of activations.
      remat: recomputation policy of the language model.
      lora_alpha: numerator of the adapters' scale, which the model's own files do not hold.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: the file is not JSON, a setting is not supported, or a special token is missing; it is named.
    """
    data = read_json(path)
    ids = special_ids(path) if (to_path(path) / "tokenizer.json").is_file() else None
    try:
        return from_json(data, ids).using(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    except ValueError as error:
        raise ValueError(f"{to_path(path) / 'config.json'}: {error}") from None


def holds(path: str | pathlib.Path) -> bool:
    """Whether a folder holds such a model, by its `config.json`."""
    place = to_path(path)
    return (place / "config.json").is_file() and read_json(place).get("model_type") in (HF, OFFICIAL)


def special_ids(path: str | pathlib.Path) -> dict[str, int]:
    """The ids of `TOKENS` in a folder's `tokenizer.json`, looked up by their strings.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: a token is missing; the message has its string.
    """
    stored = read_json(path, "tokenizer.json")
    model = stored.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    known = dict(vocabulary) if isinstance(vocabulary, Mapping) else {}
    added = stored.get("added_tokens") or ()
    known |= {token.get("content"): token.get("id") for token in added if isinstance(token, Mapping)}
    for token in TOKENS.values():
        if not isinstance(known.get(token), int):
            raise ValueError(
                f"{to_path(path) / 'tokenizer.json'} has no token {token!r}; give the tokenizer of a Janus model"
            )
    return {name: known[token] for name, token in TOKENS.items()}


def from_json(data: Mapping[str, Any], ids: Mapping[str, int] | None = None) -> JanusConfig:
    """The config from the contents of `config.json` in either layout.

    Args:
      data: the parsed file.
      ids: of `special_ids`, which the official file needs; None takes those of transformers' file.

    Raises:
      ValueError: a setting is missing or not supported, or contradicts `ids`; the field is named.
    """
    data = without_none(data, "config.json")
    found = data.get("model_type")
    if found == OFFICIAL:
        if ids is None:
            raise ValueError("the ids of its special tokens are in tokenizer.json; copy that file beside it")
        data = as_hf(data)
    elif found != HF:
        raise ValueError(
            f"the folder holds a model of model_type {found!r}, expected {HF!r} or {OFFICIAL!r}; give the folder of a "
            "Janus-Pro model"
        )
    refuse_unknown(
        data, WITHOUT_EFFECT | {"text_config", "vision_config", "vq_config", "image_token_id", "tie_word_embeddings"}
    )
    text = _LLAMA | without_none(data.get("text_config") or {}, "text_config")
    vision = _section(data, "vision_config.", _VISION, _VISION_KINDS)
    vq = _section(data, "vq_config.", _VQ, _VQ_KINDS)
    for part in (data, text):
        check_kinds(part, _IDS, zero=_IDS)
    config = JanusConfig(
        text=_text(text, bool(data.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))),
        vision=VisionConfig(
            **{field.name: vision[field.name] for field in dataclasses.fields(VisionConfig) if field.name in vision},
            intermediate_size=int(vision["hidden_size"] * vision["mlp_ratio"]),
        ),
        vq=VQConfig(
            codes=vq["num_embeddings"],
            code_width=vq["embed_dim"],
            latent=vq["latent_channels"],
            base=vq["base_channels"],
            multipliers=tuple(vq["channel_multiplier"]),
            layers=vq["num_res_blocks"],
            channels=vq["in_channels"],
            grid=vision["image_size"] // vision["patch_size"],
        ),
        **_ids(data, text, ids),
    )
    _check_joints(config, vision, vq)
    return config


def _ids(data: Mapping[str, Any], text: Mapping[str, Any], ids: Mapping[str, int] | None) -> dict[str, Any]:
    """The fields of `JanusConfig` for special tokens, of the tokenizer or else of `config.json`."""
    stops = text["eos_token_id"]
    stored = {
        "image_token_id": data.get("image_token_id"),
        "bos_token_id": text["bos_token_id"],
        "pad_token_id": text.get("pad_token_id"),
    }
    if ids is None:
        for name, value in stored.items():
            if value is None:
                raise ValueError(f"{name} is missing; copy the model's tokenizer.json beside it")
        return stored | {"stop_token_ids": (stops,) if isinstance(stops, int) else tuple(stops)}
    image = stored["image_token_id"]
    if image not in (None, ids["image"]):
        raise ValueError(
            f"image_token_id is {image}, and tokenizer.json has {ids['image']} for {TOKENS['image']}; copy both from "
            "one model"
        )
    return {
        "image_token_id": ids["image"],
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["pad"],
        "stop_token_ids": (ids["eos"],),
    }


def _section(data: Mapping[str, Any], name: str, defaults: dict, kinds: dict) -> dict[str, Any]:
    """A section of `config.json` over its defaults, after all checks of single fields."""
    stored = without_none(data.get(name[:-1]) or {}, name[:-1])
    # dropout is for training in transformers alone
    refuse_unknown(stored, WITHOUT_EFFECT | set(kinds) | _DROPOUT, _USUAL[name], name)
    check_kinds(stored, kinds, name)
    only(stored, "hidden_act", ("gelu",))
    return defaults | stored


def _text(data: Mapping[str, Any], tied: bool) -> TextConfig:
    rope = without_none(data.get("rope_parameters") or data.get("rope_scaling") or {}, "rope_parameters")
    refuse_unknown(rope, {"rope_theta", "rope_type", "type"}, {"partial_rotary_factor": 1.0}, "rope_parameters.")
    only(rope, "rope_type", ("default",))
    only(rope, "type", ("default",))
    check_kinds(data, TEXT_KINDS)
    check_kinds(rope, {"rope_theta": float}, "rope_parameters.")
    usual = {"head_dim": data["hidden_size"] // data["num_attention_heads"], "pretraining_tp": 1}
    refuse_unknown(data, WITHOUT_EFFECT | _IN_TEXT, usual, "text_config.")
    only(data, "model_type", ("llama",))
    only(data, "hidden_act", ("silu",))
    half = data["hidden_size"] // data["num_attention_heads"] // 2
    return TextConfig(
        **text_sizes(data),
        rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 1e4))),
        mrope_section=(half, 0, 0),
        norm_epsilon=float(data["rms_norm_eps"]),
        tied=tied,
        qkv_bias=False,
    )


def _check_joints(config: JanusConfig, vision: Mapping[str, Any], vq: Mapping[str, Any]) -> None:
    """Widths and counts that the files hold twice."""
    width = config.text.width
    for name, value, wanted in (
        ("vision_config.projection_dim", vision["projection_dim"], width),
        ("vision_config.num_image_tokens", vision["num_image_tokens"], config.vision.tokens),
        ("vq_config.projection_dim", vq["projection_dim"], width),
        ("vq_config.image_token_embed_dim", vq["image_token_embed_dim"], width),
        ("vq_config.num_patches", vq.get("num_patches", config.vq.grid), config.vq.grid),
        ("vq_config.out_channels", vq["out_channels"], vq["in_channels"]),
    ):
        if value != wanted:
            raise ValueError(f"{name} is {value}, and the rest of the file asks for {wanted}")


def to_json(config: JanusConfig) -> dict[str, Any]:
    """The contents of `config.json` in transformers' layout; the inverse of `from_json`."""
    text, vision, vq = config.text, config.vision, config.vq
    stops = config.stop_token_ids
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": HF,
        "dtype": "float32",
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": text.tied,
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.key_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 16384,
            "rms_norm_eps": text.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "tie_word_embeddings": text.tied,
            "pad_token_id": config.pad_token_id,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": stops[0] if len(stops) == 1 else list(stops),
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": vision.hidden_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": vision.num_channels,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "projection_dim": text.width,
            "num_image_tokens": vision.tokens,
            "depth": 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": vq.code_width,
            "num_embeddings": vq.codes,
            "latent_channels": vq.latent,
            "base_channels": vq.base,
            "channel_multiplier": list(vq.multipliers),
            "num_res_blocks": vq.layers,
            "num_patches": vq.grid,
            "in_channels": vq.channels,
            "out_channels": vq.channels,
            "projection_dim": text.width,
            "image_token_embed_dim": text.width,
            "num_hidden_layers": 2,
        },
    }
