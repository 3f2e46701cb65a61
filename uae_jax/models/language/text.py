"""The language model of Qwen2.5-VL (arXiv 2502.13923; 2407.10671 for the decoder), of Qwen3 (arXiv 2505.09388) and of
Llama (arXiv 2302.13971): scanned layers, M-RoPE, grouped queries.

One forward pass serves every use. `Memory` holds keys and values that were computed earlier. Groups of consecutive rows
share a memory with fewer rows than the batch: the completions of one image read one copy of its prompt.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uae_jax.models.language.config import TextConfig
from uae_jax.nn.attention import Mask, SharedKeys, attention
from uae_jax.nn.constrain import constrain
from uae_jax.nn.linear import Dense
from uae_jax.nn.loops import scan_layers
from uae_jax.nn.mlp import GatedMLP
from uae_jax.nn.norms import RMSNorm
from uae_jax.nn.rope import apply_rope


class KV(NamedTuple):
    """Rotated keys, and values, of all layers, or of one without the first axis."""

    key: Float[Array, "*l n t j k"]
    value: Float[Array, "*l n t j k"]


class Memory(NamedTuple):
    """Keys and values `[L, M, S, J, K]` that precede the tokens of a forward pass, and which of them count.

    M divides the rows N of the batch; rows `i * N/M` to `(i + 1) * N/M - 1` read entry i.
    """

    kv: KV
    mask: Bool[Array, "m s"]


def mrope_angles(config: TextConfig, positions: Int[Array, "n t 3"]) -> Float[Array, "n t half"]:
    """Rotation angles, K / 2 a head, from positions (time, row, column).

    Sections of the frequencies follow one axis each (arXiv 2409.12191, section 2.1).
    """
    width = config.head_width
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    axes = np.repeat(np.arange(3), config.mrope_section)
    return positions[..., axes].astype(jnp.float32) * frequencies


class Attention(nn.Module):
    """Causal self-attention with grouped queries; biases, where there are any, are on query, key and value."""

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        angles: Float[Array, "#n t half"],
        mask: Mask,
        memories: tuple[SharedKeys, ...],
    ) -> tuple[Float[Array, "n t d"], KV]:
        """The mixed tokens, and the keys and values of this layer."""
        c = self.config
        rows, length, _ = x.shape

        def project(name: str, heads: int) -> Array:
            y = Dense(heads * c.head_width, use_bias=c.qkv_bias, lora_alpha=c.lora_alpha, name=name)(x)
            return constrain(y.reshape(rows, length, heads, c.head_width), "batch", None, "heads", None)

        query, key = project("query", c.heads), project("key", c.key_heads)
        if c.qk_norm:
            query = RMSNorm(c.norm_epsilon, name="query_norm")(query)
            key = RMSNorm(c.norm_epsilon, name="key_norm")(key)
        query, key = apply_rope(query, angles), apply_rope(key, angles)
        value = project("value", c.key_heads)
        mixed = attention(query, key, value, mask, memories).reshape(rows, length, -1)
        return Dense(c.width, use_bias=False, lora_alpha=c.lora_alpha, name="output")(mixed), KV(key, value)


class Layer(nn.Module):
    """One pre-norm decoder layer, in the form that a scan over layers needs."""

    config: TextConfig
    return_kv: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n t d"],
        stored: tuple[KV, ...],
        angles: Float[Array, "#n t half"],
        mask: Mask,
        stored_masks: tuple[Bool[Array, "_ _"], ...],
    ) -> tuple[Float[Array, "n t d"], KV | None]:
        """Maps the tokens; `stored` holds this layer's keys and values of each memory."""
        c = self.config
        x = constrain(x, "batch")
        memories = tuple(SharedKeys(kv.key, kv.value, valid) for kv, valid in zip(stored, stored_masks))
        normed = RMSNorm(c.norm_epsilon, name="attention_norm")(x)
        mixed, kv = Attention(c, name="attention")(normed, angles, mask, memories)
        x = x + constrain(mixed, "batch")
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        x = constrain(x + GatedMLP(c.mlp_width, lora_alpha=c.lora_alpha, name="mlp")(normed), "batch")
        return x, kv if self.return_kv else None


class Embedding(nn.Module):
    """The token table `[V, D]`, which is also the head when tied."""

    vocab_size: int
    width: int

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(0.02), (self.vocab_size, self.width), jnp.float32)

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """The rows of the table at token ids; those of ids beyond the table are its last one, not NaN."""
        return constrain(jnp.take(self.table, ids, axis=0, mode="clip"), "batch")

    def attend(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Float32 logits of hidden states."""
        return jnp.einsum("...d,vd->...v", hidden, self.table.astype(hidden.dtype), preferred_element_type=jnp.float32)


class Head(nn.Module):
    """An output matrix `[D, V]` of its own."""

    vocab_size: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Float32 logits of hidden states."""
        shape = (hidden.shape[-1], self.vocab_size)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        scores = jnp.einsum("...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        if not self.use_bias:
            return scores
        return scores + self.param("bias", nn.initializers.zeros, (self.vocab_size,), jnp.float32).astype(jnp.float32)


class LanguageModel(nn.Module):
    """The decoder.

    Attributes:
      config: sizes.
      return_kv: whether a forward pass also returns its keys and values.
    """

    config: TextConfig
    return_kv: bool = False

    def setup(self):
        c = self.config
        self.embedding = Embedding(c.vocab_size, c.width)
        in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = scan_layers(Layer, c.layers, c.remat, in_axes)(c, self.return_kv)
        self.final_norm = RMSNorm(c.norm_epsilon)
        if not c.tied:
            self.head = Head(c.vocab_size)

    def embed(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows d"]:
        """Embeddings of token ids in the config's precision."""
        return self.embedding(ids).astype(self.config.dtype)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Float32 logits of final hidden states."""
        scores = self.embedding.attend(hidden) if self.config.tied else self.head(hidden)
        return constrain(scores, "batch", *[None] * (hidden.ndim - 2), "vocab")

    def __call__(
        self,
        embeds: Float[Array, "n t d"],
        positions: Int[Array, "#n t 3"],
        mask: Bool[Array, "n t"],
        memories: tuple[Memory, ...] = (),
    ) -> tuple[Float[Array, "n t d"], KV | None]:
        """Runs tokens that see each other causally and all valid entries of the memories.

        Args:
          embeds: of the tokens.
          positions: M-RoPE positions (time, row, column); one row where all rows have the same.
          mask: False for padding, which is on the right.
          memories: keys and values that precede these tokens.

        Returns:
          Hidden states after the final norm, and the keys and values if `return_kv`.
        """
        own = Mask(valid=mask, causal=True, right_padded=True)
        stored, stored_masks = tuple(m.kv for m in memories), tuple(m.mask for m in memories)
        x = embeds.astype(self.config.dtype)
        x, kv = self.layers(x, stored, mrope_angles(self.config, positions), own, stored_masks)
        return self.final_norm(x), kv

    def initialise(self, ids: Int[Array, "n t"]) -> Float[Array, "n t v"]:
        """Touches every parameter, for `init`: ids to logits."""
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :, None], (*ids.shape, 3))
        return self.logits(self(self.embed(ids), positions, jnp.ones(ids.shape, bool))[0])
