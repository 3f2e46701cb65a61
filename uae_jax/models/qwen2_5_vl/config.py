"""Sizes of Qwen2.5-VL (arXiv 2502.13923), read from and written to the published `config.json`."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from uae_jax.files.json_files import read_json
from uae_jax.files.known_fields import WITHOUT_EFFECT, check_kinds, needed, only, refuse_unknown, without_none
from uae_jax.files.paths import to_path
from uae_jax.models.language.config import TEXT_KINDS, TextConfig, check_choices, text_sizes

_OUTER = frozenset(
    """
    vision_config text_config image_token_id video_token_id vision_start_token_id vision_end_token_id vision_token_id
    tie_word_embeddings
    """.split()
)
# read, or for videos and windows that are not used
_IN_TEXT = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size hidden_act
    rms_norm_eps rope_theta rope_scaling rope_parameters use_sliding_window sliding_window max_window_layers layer_types
    max_position_embeddings
    """.split()
)
_NEVER_CHANGED = {"partial_rotary_factor": 1.0, "attention_bias": True, "pretraining_tp": 1}
_IDS = dict.fromkeys(
    """
    image_token_id video_token_id vision_start_token_id vision_end_token_id pad_token_id bos_token_id
    """.split(),
    int,
) | {"eos_token_id": int | tuple[int, ...]}
_VISION_KINDS = dict.fromkeys(
    """
    depth hidden_size num_heads intermediate_size out_hidden_size patch_size temporal_patch_size in_channels in_chans
    spatial_merge_size window_size
    """.split(),
    int,
) | {"fullatt_block_indexes": tuple[int, ...]}
_IN_ROPE = frozenset({"type", "rope_type", "mrope_section", "rope_theta"})
_IN_VISION = frozenset(
    """
    depth hidden_size hidden_act num_heads intermediate_size out_hidden_size patch_size temporal_patch_size in_channels
    in_chans spatial_merge_size spatial_patch_size window_size fullatt_block_indexes tokens_per_second rope_parameters
    """.split()
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The image encoder.

    Attributes:
      depth: number of blocks.
      width: width of the blocks.
      heads: attention heads.
      mlp_width: inner width of the gated MLP.
      out_width: width of the image embeddings, that of the language model.
      patch_size: side of a patch in pixels.
      temporal_patch_size: frames in a patch (a still image is repeated).
      channels: colour channels.
      merge_size: patches merged along each side into one embedding.
      window_size: side of an attention window in pixels; used by the data side, which numbers the windows.
      full_attention_blocks: indices of the blocks that attend to all patches of an image.
      dtype: precision of activations, `float32` or `bfloat16`.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.
    """

    depth: int = 32
    width: int = 1280
    heads: int = 16
    mlp_width: int = 3420
    out_width: int = 2048
    patch_size: int = 14
    temporal_patch_size: int = 2
    channels: int = 3
    merge_size: int = 2
    window_size: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    dtype: str = "float32"
    remat: str = "none"

    @property
    def patch_width(self) -> int:
        """Numbers in one flattened patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLConfig:
    """The complete model; the defaults are the published 3B size.

    Attributes:
      vision: the image encoder.
      text: the language model.
      image_token_id: token whose embeddings are replaced by those of the images.
      video_token_id, vision_start_token_id, vision_end_token_id: other special tokens of the published vocabulary.
      pad_token_id: token written after the end of a completion; masks never depend on it.
      stop_token_ids: tokens that end a completion.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    pad_token_id: int = 151643
    stop_token_ids: tuple[int, ...] = (151645, 151643)

    def __post_init__(self):
        """Raises ValueError when sizes do not fit each other."""
        text, vision = self.text, self.vision
        text.check()
        if vision.width % (4 * vision.heads):
            raise ValueError("vision_config.hidden_size must be a multiple of 4 * num_heads")
        if vision.out_width != text.width:
            raise ValueError(f"vision_config.out_hidden_size is {vision.out_width}, hidden_size is {text.width}")
        check_choices(vision.dtype, vision.remat)

    def using(
        self, *, dtype: str | None = None, remat: str | None = None, lora_alpha: float | None = None
    ) -> "Qwen2_5VLConfig":
        """The same sizes with other precision, recomputation or adapter scale; None keeps a setting.

        Raises:
          ValueError: unknown `dtype` or `remat`.
        """
        both = {name: value for name, value in (("dtype", dtype), ("remat", remat)) if value is not None}
        text = self.text.using(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
        return dataclasses.replace(self, vision=dataclasses.replace(self.vision, **both), text=text)


# Qwen/Qwen2.5-VL-3B-Instruct, which has the defaults, and -7B-Instruct, by the beginning of `config.model.sizes`
PUBLISHED = {
    "qwen2_5_vl_3b": Qwen2_5VLConfig(),
    "qwen2_5_vl_7b": Qwen2_5VLConfig(
        vision=VisionConfig(out_width=3584),
        text=TextConfig(vocab_size=152064, width=3584, layers=28, heads=28, key_heads=4, mlp_width=18944, tied=False),
    ),
}


def from_folder(
    path: str | pathlib.Path, *, dtype: str = "float32", remat: str = "none", lora_alpha: float = 64.0
) -> Qwen2_5VLConfig:
    """Reads `config.json` (and the stop tokens of `generation_config.json`) of either generation of the layout.

    Args:
      path: the model's folder.
      dtype: precision of activations.
      remat: recomputation policy.
      lora_alpha: numerator of the adapters' scale, which the model's own files do not hold.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: the file is not JSON, or a setting is not supported; the field is named.
    """
    data, folder = read_json(path), to_path(path)
    stops = (
        read_json(folder, "generation_config.json").get("eos_token_id")
        if (folder / "generation_config.json").exists()
        else None
    )
    try:
        return from_json(data, stops).using(dtype=dtype, remat=remat, lora_alpha=lora_alpha)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def from_json(data: Mapping[str, Any], stop_token_ids: Any = None) -> Qwen2_5VLConfig:
    """The config from the contents of `config.json`.

    Text settings stand flat beside `rope_scaling` (as published) or in `text_config` with `rope_parameters`.

    Args:
      data: the parsed file.
      stop_token_ids: an int or ints to use in place of the file's `eos_token_id`.

    Raises:
      ValueError: a setting is missing or not supported; the field is named.
    """
    data = without_none(data, "config.json")
    found = data.get("model_type", data.get("_class_name", "qwen2_5_vl"))
    if found != "qwen2_5_vl":
        raise ValueError(
            f"the folder holds a model of model_type {found!r}, expected 'qwen2_5_vl'; give the folder of a "
            "Qwen2.5-VL model"
        )
    text = without_none(data["text_config"], "text_config") if data.get("text_config") else data
    # beside text_config, settings of the text that stand outside are older copies, which transformers does not read
    if text is not data:
        refuse_unknown(data, WITHOUT_EFFECT | _OUTER | _IN_TEXT | {"head_dim"}, _NEVER_CHANGED)
    stops = stop_token_ids if stop_token_ids is not None else text.get("eos_token_id", data.get("eos_token_id", 151645))
    for part in (data, text, {"eos_token_id": stops}):
        check_kinds(part, _IDS, zero=_IDS)
    pad = text.get("pad_token_id", data.get("pad_token_id"))
    return Qwen2_5VLConfig(
        vision=_vision(without_none(needed(data, "vision_config"), "vision_config")),
        text=_text(text, _tied(data, text)),
        image_token_id=data.get("image_token_id", 151655),
        video_token_id=data.get("video_token_id", 151656),
        vision_start_token_id=data.get("vision_start_token_id", 151652),
        vision_end_token_id=data.get("vision_end_token_id", 151653),
        pad_token_id=text.get("bos_token_id", 151643) if pad is None else pad,
        stop_token_ids=(stops,) if isinstance(stops, int) else tuple(stops or ()),
    )


def _tied(data: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding table: the outer flag where it stands, else that of the text's part."""
    outer = data.get("tie_word_embeddings")
    return bool(text.get("tie_word_embeddings") if outer is None else outer)


def _vision(data: Mapping[str, Any]) -> VisionConfig:
    refuse_unknown(data, WITHOUT_EFFECT | _IN_VISION, what="vision_config.")
    check_kinds(data, _VISION_KINDS, "vision_config.")
    only(data, "hidden_act", ("silu",))
    rope = without_none(data.get("rope_parameters") or {}, "vision_config.rope_parameters")
    refuse_unknown(rope, _IN_ROPE, {"partial_rotary_factor": 1.0}, "vision_config.rope_parameters.")
    only(rope, "rope_type", ("axial", "default"))
    only(rope, "rope_theta", (10000.0,))
    return VisionConfig(
        depth=needed(data, "depth"),
        width=needed(data, "hidden_size"),
        heads=needed(data, "num_heads"),
        mlp_width=needed(data, "intermediate_size"),
        out_width=needed(data, "out_hidden_size"),
        patch_size=data.get("patch_size", 14),
        temporal_patch_size=data.get("temporal_patch_size", 2),
        channels=data.get("in_channels", data.get("in_chans", 3)),
        merge_size=data.get("spatial_merge_size", 2),
        window_size=data.get("window_size", 112),
        full_attention_blocks=tuple(data.get("fullatt_block_indexes", (7, 15, 23, 31))),
    )


def _text(data: Mapping[str, Any], tied: bool) -> TextConfig:
    rope = without_none(data.get("rope_parameters") or data.get("rope_scaling") or {}, "rope_scaling")
    check_kinds(data, TEXT_KINDS)
    check_kinds(rope, {"rope_theta": float, "mrope_section": tuple[int, int, int]}, "rope_scaling.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"rope_type is {kind!r}; only 'default' (or 'mrope') is supported")
    refuse_unknown(rope, _IN_ROPE, {"partial_rotary_factor": 1.0}, "rope_scaling.")
    usual = _NEVER_CHANGED | {"head_dim": data.get("hidden_size", 0) // (data.get("num_attention_heads") or 1)}
    refuse_unknown(data, WITHOUT_EFFECT | _OUTER | _IN_TEXT, usual)
    only(data, "hidden_act", ("silu",))
    only(data, "use_sliding_window", (False, None))
    if set(data.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("layer_types has other than 'full_attention', which alone is supported")
    return TextConfig(
        **text_sizes(data),
        rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 1e6))),
        mrope_section=tuple(needed(rope, "mrope_section")),
        norm_epsilon=float(data.get("rms_norm_eps", 1e-5)),
        tied=tied,
    )


def to_json(config: Qwen2_5VLConfig) -> dict[str, Any]:
    """The contents of `config.json` in the published (flat) layout; the inverse of `from_json`."""
    text, vision = config.text, config.vision
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.key_heads,
        "intermediate_size": text.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": text.norm_epsilon,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "tie_word_embeddings": text.tied,
        "use_sliding_window": False,
        "max_position_embeddings": 128000,
        "bos_token_id": config.pad_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.stop_token_ids[0] if config.stop_token_ids else None,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "torch_dtype": "float32",
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "hidden_act": "silu",
            "num_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "out_hidden_size": vision.out_width,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "in_channels": vision.channels,
            "spatial_merge_size": vision.merge_size,
            "window_size": vision.window_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
        },
    }
