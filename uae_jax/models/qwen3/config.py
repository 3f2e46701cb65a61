"""Sizes of Qwen3 (arXiv 2505.09388), read from the published `config.json`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from uae_jax.files.json_files import read_json
from uae_jax.files.known_fields import WITHOUT_EFFECT, check_kinds, only, refuse_unknown, without_none
from uae_jax.files.paths import to_path
from uae_jax.models.language.config import TEXT_KINDS, TextConfig, text_sizes

# read, or for windows that are not used
_KNOWN = frozenset(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size head_dim
    hidden_act rms_norm_eps rope_theta rope_parameters rope_scaling tie_word_embeddings use_sliding_window
    sliding_window max_window_layers layer_types max_position_embeddings
    """.split()
)

# Qwen/Qwen3-4B, the text encoder of FLUX.2-klein-4B and of Z-Image
QWEN3_4B = TextConfig(
    width=2560,
    heads=32,
    key_heads=8,
    mlp_width=9728,
    mrope_section=(64, 0, 0),
    qkv_bias=False,
    own_head_width=128,
    qk_norm=True,
)
# a user's turn in the chat template: before the text, and behind it with the header of the answer
TURN = ((151644, 872, 198), (151645, 198, 151644, 77091, 198))
NO_THINKING = (151667, 271, 151668, 271)
PAD = 151643


def from_folder(path: str | pathlib.Path, *, dtype: str = "float32") -> TextConfig:
    """Reads `config.json`.

    Args:
      path: the model's folder.
      dtype: precision of activations.

    Raises:
      FileNotFoundError: there is no `config.json`.
      ValueError: the file is not JSON, of another model, or has a setting that is not supported; the field is named.
    """
    try:
        return from_json(read_json(path)).using(dtype=dtype)
    except ValueError as error:
        file = str(to_path(path) / "config.json")
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def from_json(data: Mapping[str, Any]) -> TextConfig:
    """The sizes of a parsed `config.json`.

    Raises:
      ValueError: a setting is missing or not supported; the field is named.
    """
    data = without_none(data, "config.json")
    if data.get("model_type", "qwen3") != "qwen3":
        raise ValueError(f"the folder holds a model of model_type {data['model_type']!r}, expected 'qwen3'")
    rope = without_none(data.get("rope_parameters") or data.get("rope_scaling") or {}, "rope_parameters")
    check_kinds(data, TEXT_KINDS | {"head_dim": int})
    check_kinds(rope, {"rope_theta": float}, "rope_parameters.")
    only(rope, "rope_type", ("default",))
    refuse_unknown(rope, ("rope_type", "rope_theta"), {"partial_rotary_factor": 1.0}, "rope_parameters.")
    refuse_unknown(data, WITHOUT_EFFECT | _KNOWN)
    only(data, "hidden_act", ("silu",))
    only(data, "use_sliding_window", (False, None))
    head = data.get("head_dim", 128)
    if head % 2:
        raise ValueError(f"head_dim is {head}; it must be even")
    config = TextConfig(
        **text_sizes(data),
        rope_theta=float(rope.get("rope_theta", data.get("rope_theta", 1e4))),
        mrope_section=(head // 2, 0, 0),
        norm_epsilon=float(data.get("rms_norm_eps", 1e-6)),
        tied=bool(data.get("tie_word_embeddings", False)),
        qkv_bias=False,
        own_head_width=head,
        qk_norm=True,
    )
    config.check()
    return config
