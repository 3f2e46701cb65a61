"""Blocks of diffusion transformers with two streams of tokens that turn with rotary positions (FLUX.2, Qwen-Image).

The modules are created in the caller's, so that their names are those of its parts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.nn.attention import Mask, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.modulation import gated_sum, modulated_norm
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.rope import Rotation, apply_paired_rope

Parts = Sequence[Float[Array, "b 1 d"]]  # shift, scale and gate of attention, then of the MLP
Stream = tuple[str, Float[Array, "b t d"]]  # what stands before the names of its maps, and its tokens


@dataclasses.dataclass(frozen=True)
class Maps:
    """The linear maps of a block's attention.

    Attributes:
      heads: their number.
      head_width: numbers of one.
      lora_alpha: numerator of the adapters' scale.
      use_bias: whether they have a bias.
      epsilon: of the norms of queries and keys.
    """

    heads: int
    head_width: int
    lora_alpha: float
    use_bias: bool
    epsilon: float

    def dense(self, name: str) -> Dense:
        """A map to all heads."""
        return Dense(self.heads * self.head_width, use_bias=self.use_bias, lora_alpha=self.lora_alpha, name=name)

    def split(self, x: Float[Array, "b t d"], prefix: str = "") -> list[Array]:
        """Query, key and value `[B, T, H, K]` of one stream, the first two through their norms."""
        shape = (*x.shape[:2], self.heads, self.head_width)
        query, key, value = (self.dense(f"{prefix}{name}")(x).reshape(shape) for name in ("query", "key", "value"))
        return self.normed(query, key, value, prefix)

    def normed(self, query: Array, key: Array, value: Array, prefix: str = "") -> list[Array]:
        """The same heads, queries and keys through their norms."""
        query = RMSNorm(self.epsilon, name=f"{prefix}query_norm")(query)
        key = RMSNorm(self.epsilon, name=f"{prefix}key_norm")(key)
        return [constrain(part, "batch", None, "heads", None) for part in (query, key, value)]


class JointAttention(nn.Module):
    """Attention over the tokens of both streams together, each with its own maps."""

    maps: Maps

    @nn.compact
    def __call__(self, streams: Sequence[Stream], rotation: Rotation, mask: Mask = Mask()) -> list[Array]:
        """The mixed tokens of each stream; `rotation` and `mask` are of all, in the order of `streams`."""
        heads = zip(*(self.maps.split(x, prefix) for prefix, x in streams))
        query, key, value = (jnp.concatenate(parts, axis=1) for parts in heads)
        mixed = attention(apply_paired_rope(query, rotation), apply_paired_rope(key, rotation), value, mask)
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        ends, found = [], []
        for prefix, x in streams:
            begin = ends[-1] if ends else 0
            ends.append(begin + x.shape[1])
            found.append(self.maps.dense(f"{prefix}output")(mixed[:, begin : ends[-1]]))
        return found


def updated(
    streams: Sequence[Stream],
    parts: Sequence[Parts],
    mix: Callable[[Sequence[Stream]], Sequence[Array]],
    feed_forward: Callable[[str], Callable[[Array], Any]],
    epsilon: float = 1e-6,
) -> list[Array]:
    """The tokens of each stream after attention and MLP with adaptive layer norms (arXiv 2403.03206, figure 2b).

    Args:
      streams: both.
      parts: of each stream's modulation.
      mix: the attention.
      feed_forward: the MLP by its name.
      epsilon: of the norms.
    """
    normed = [(name, modulated_norm(x, scale, shift, epsilon)) for (name, x), (shift, scale, *_) in zip(streams, parts)]
    found = []
    for (name, x), update, (_, _, gate, shift, scale, ff_gate) in zip(streams, mix(normed), parts):
        x = gated_sum(x, gate, update)
        inner = feed_forward(f"{name}feed_forward")(modulated_norm(x, scale, shift, epsilon))
        found.append(gated_sum(x, ff_gate, inner))
    return found
