"""Sizes of a language model, read from the settings that transformers writes."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from uae_jax.files.known_fields import needed
from uae_jax.nn.remat import POLICIES

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model.

    Attributes:
      vocab_size: rows of the embedding table.
      width: width of the residual stream.
      layers: number of decoder layers.
      heads: query heads.
      key_heads: key and value heads; divides `heads`.
      mlp_width: inner width of the gated MLP.
      rope_theta: base of the rotary frequencies.
      mrope_section: rotary frequencies that turn with time, row and column; sums to half the head width. Plain rotary
        positions turn all with time.
      norm_epsilon: epsilon of the RMS norms.
      tied: whether the head is the transposed embedding table.
      qkv_bias: whether query, key and value have a bias.
      own_head_width: width of a head where it is not `width / heads` (Qwen3); 0 where it is.
      qk_norm: whether queries and keys have an RMS norm over each head (Qwen3).
      lora_alpha: numerator of the adapters' scale.
      dtype: precision of activations, `float32` or `bfloat16`.
      remat: what the backward pass recomputes, one of `nn.remat.POLICIES`.
    """

    vocab_size: int = 151936
    width: int = 2048
    layers: int = 36
    heads: int = 16
    key_heads: int = 2
    mlp_width: int = 11008
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    norm_epsilon: float = 1e-6
    tied: bool = True
    qkv_bias: bool = True
    own_head_width: int = 0
    qk_norm: bool = False
    lora_alpha: float = 64.0
    dtype: str = "float32"
    remat: str = "none"

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.own_head_width or self.width // self.heads

    def check(self) -> None:
        """Checks that sizes fit each other; apart from `__init__`, so that fields can be replaced one by one.

        Raises:
          ValueError: they do not, or a choice is not known.
        """
        if not self.own_head_width and self.width % self.heads or self.heads % self.key_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads, and that of num_key_value_heads")
        if sum(self.mrope_section) * 2 != self.head_width:
            raise ValueError(
                f"mrope_section {self.mrope_section} must sum to half the head width, {self.head_width // 2}"
            )
        check_choices(self.dtype, self.remat)

    def using(
        self, *, dtype: str | None = None, remat: str | None = None, lora_alpha: float | None = None
    ) -> "TextConfig":
        """The same sizes with other precision, recomputation or adapter scale; None keeps a setting."""
        given = {"dtype": dtype, "remat": remat, "lora_alpha": None if lora_alpha is None else float(lora_alpha)}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


def check_choices(dtype: str, remat: str) -> None:
    """Checks the settings that no size depends on.

    Raises:
      ValueError: unknown precision or recomputation.
    """
    for name, value, known in (("remat", remat, POLICIES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; use one of {', '.join(known)}")


class CaptionerConfig(Protocol):
    """What the functions of a language model need to know of the captioner around it."""

    @property
    def text(self) -> TextConfig: ...

    @property
    def image_token_id(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...


TEXT_KINDS = dict.fromkeys(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    """.split(),
    int,
) | {"rope_theta": float, "rms_norm_eps": float, "layer_types": tuple[str, ...], "tie_word_embeddings": bool}


def text_sizes(data: Mapping[str, Any]) -> dict[str, Any]:
    """The whole numbers of a `TextConfig`, from a text section of a `config.json` whose kinds have been checked.

    Raises:
      ValueError: a size is missing; the field is named.
    """
    heads = needed(data, "num_attention_heads")
    return dict(
        vocab_size=needed(data, "vocab_size"),
        width=needed(data, "hidden_size"),
        layers=needed(data, "num_hidden_layers"),
        heads=heads,
        key_heads=data.get("num_key_value_heads") or heads,
        mlp_width=needed(data, "intermediate_size"),
    )
