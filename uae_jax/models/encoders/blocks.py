"""What the encoders' layers share: patches, activations, self-attention, the block of plain transformers."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.norms import LayerNorm
from uae_jax.nn.rope import apply_rope

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that a `config.json` names.

    Raises:
      ValueError: the name is not known.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r} is not supported; known: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def image_patches(pixels: Float[Array, "b height width c"], patch: int) -> Float[Array, "b p c*{patch}**2"]:
    """Patches of images in reading order.

    Args:
      pixels: what is left over behind the last complete patch is dropped, as a convolution would.
      patch: side of a patch in pixels.

    Returns:
      Channel first inside a patch: the order of a flattened torch convolution kernel.
    """
    batch, height, width, channels = pixels.shape
    rows, columns = height // patch, width // patch
    x = pixels[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows * columns, channels * patch * patch)


class SelfAttention(nn.Module):
    """Multi-head self-attention, optionally with rotary positions (arXiv 1706.03762, section 3.2).

    Attributes:
      heads: number of heads; divides the width.
      biases: whether the query, key, value and output maps have a bias.
    """

    heads: int
    biases: tuple[bool, bool, bool, bool] = (True, True, True, True)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Mask = Mask(), angles: Float[Array, "t half"] | None = None
    ) -> Float[Array, "b t d"]:
        """Mixes the tokens; `angles` in radians, K / 2 a head."""
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        query, key, value = (
            constrain(Dense(width, use_bias=bias, name=name)(x).reshape(shape), "batch", None, "heads", None)
            for name, bias in zip(("query", "key", "value"), self.biases)
        )
        if angles is not None:
            query, key = apply_rope(query, angles), apply_rope(key, angles)
        mixed = attention(query, key, value, mask).reshape(batch, length, width)
        return Dense(width, use_bias=self.biases[3], name="out")(mixed)


class BlockSizes(Protocol):
    """Sizes of a `TransformerBlock`, with transformers' names."""

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def hidden_act(self) -> str: ...

    @property
    def layer_norm_eps(self) -> float: ...


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    config: BlockSizes

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], mask: Mask) -> tuple[Float[Array, "b t d"], None]:
        """The tokens, and None (what a scan collects)."""
        config = self.config
        y = LayerNorm(config.layer_norm_eps, name="norm1")(x)
        x = x + SelfAttention(config.num_attention_heads, name="attention")(y, mask)
        y = LayerNorm(config.layer_norm_eps, name="norm2")(x)
        y = activation(config.hidden_act)(Dense(config.intermediate_size, name="fc1")(y))
        return x + Dense(config.hidden_size, name="fc2")(y), None
