"""Scores of tokens under a frozen head, a block of the vocabulary at a time, with their gradient by the hidden states.

The gradient of a log-probability by its own hidden state is the token's row of the head less the mean row under the
distribution. That is an attention of hidden states over the vocabulary, with the head as keys and values. The pass that
makes the logits sums it, too (arXiv 2205.14135, section 3.1): each block of the head is read once, and no logits are
kept or recomputed.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uae_jax.nn.attention.mask import MASKED
from uae_jax.nn.constrain import constrain, ways
from uae_jax.nn.loops import scan


class _Sums(NamedTuple):
    """Of the blocks so far, float32: the largest logit, the sum of weights, the weighted rows of the head or None."""

    largest: Float[Array, " n"]
    total: Float[Array, " n"]
    rows: Float[Array, "n d"] | None


class Blocks(NamedTuple):
    """A head in blocks of its vocabulary; each block holds a piece of the shard of every device along the axis `vocab`.

    Attributes:
      head: `[W, blocks, S, D]` where tied, else `[D, W, blocks, S]`; W devices, S tokens of each in a block.
      tied: whether it is a table of embeddings.
      vocabulary: number of tokens; the rest is padding.
    """

    head: Float[Array, "..."]
    tied: bool
    vocabulary: int

    @classmethod
    def split(cls, head: Float[Array, "_ _"], tied: bool, blocks: int) -> "Blocks":
        """A table `[V, D]`, or an untied matrix `[D, V]`, in so many blocks."""
        axis, devices = (0 if tied else 1), ways("vocab")
        vocabulary = head.shape[axis]
        size = -(-vocabulary // (devices * blocks))
        room = [(0, 0), (0, 0)]
        room[axis] = (0, devices * blocks * size - vocabulary)
        shape = (devices, blocks, size, head.shape[1]) if tied else (head.shape[0], devices, blocks, size)
        return cls((jnp.pad(head, room) if room[axis][1] else head).reshape(shape), tied, vocabulary)

    @property
    def shape(self) -> tuple[int, int, int]:
        """W, blocks, S."""
        devices, blocks, size = self.head.shape[:3] if self.tied else self.head.shape[1:]
        return devices, blocks, size

    def block(self, index: Int[Array, ""], dtype: jnp.dtype) -> tuple[Float[Array, "_ _"], Int[Array, " v"]]:
        """One block, `[W S, D]` or `[D, W S]`, and its tokens `[W S]`."""
        devices, blocks, size = self.shape
        tokens = jnp.arange(devices)[:, None] * (blocks * size) + index * size + jnp.arange(size)
        part = jax.lax.dynamic_index_in_dim(self.head, index, 1 if self.tied else 2, keepdims=False).astype(dtype)
        shape = (devices * size, -1) if self.tied else (-1, devices * size)
        return part.reshape(shape), tokens.reshape(-1)


def _pass(blocks: Blocks, hidden: Array, temperature: float | Array, with_rows: bool) -> _Sums:
    """The sums over the complete vocabulary; `hidden` `[N, D]`."""
    letters = "vd" if blocks.tied else "dv"
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    padded = math.prod(blocks.shape) > blocks.vocabulary

    def add(sums: _Sums, index: Array) -> tuple[_Sums, None]:
        part, ids = blocks.block(index, hidden.dtype)
        scaled = constrain(product(f"nd,{letters}->nv", hidden, part), "batch", "vocab") / temperature
        if padded:
            scaled = jnp.where(ids < blocks.vocabulary, scaled, MASKED)
        largest = jnp.maximum(sums.largest, jnp.max(scaled, -1))
        shrink, weights = jnp.exp(sums.largest - largest), jnp.exp(scaled - largest[:, None])
        rows = None
        if sums.rows is not None:
            rows = sums.rows * shrink[:, None] + product(f"nv,{letters}->nd", weights.astype(hidden.dtype), part)
        return _Sums(largest, sums.total * shrink + jnp.sum(weights, -1), rows), None

    zero = jnp.zeros(len(hidden), jnp.float32)
    start = _Sums(zero + MASKED, zero, jnp.zeros(hidden.shape, jnp.float32) if with_rows else None)
    return scan(add, start, jnp.arange(blocks.shape[1]))[0]


def frozen_head_scores(
    head: Float[Array, "_ _"],
    tied: bool,
    hidden: Float[Array, "n d"],
    tokens: Int[Array, " n"],
    *,
    temperature: float | Float[Array, ""],
    blocks: int,
    with_entropy: bool,
) -> tuple[Float[Array, " n"], Float[Array, " n"] | None]:
    """Log-probabilities of tokens, computed together with their gradient by the hidden states.

    Args:
      head: the table `[V, D]` of a tied head, or the matrix `[D, V]`; it gets no gradient.
      tied: which of the two.
      hidden: the states that predict the tokens.
      tokens: to score.
      temperature: positive; logits are divided by it.
      blocks: of the vocabulary; logits `[N, V / blocks]` exist at once.
      with_entropy: whether entropies are computed too.

    Returns:
      Float32 each; the entropy, in nats, has no gradient, or is None.
    """
    split = Blocks.split(head, tied, blocks)

    def results(hidden: Array, tokens: Array, with_rows: bool) -> tuple[tuple[Array, Array | None], Array | None]:
        """Scores, and their slopes `[N, D]` if the head's rows are summed."""
        own = jnp.take(head, tokens, axis=0) if tied else jnp.take(head, tokens, axis=1).T
        own = constrain(own, "batch").astype(hidden.dtype).astype(jnp.float32)
        sums, state = _pass(split, hidden, temperature, with_rows), hidden.astype(jnp.float32)
        normaliser = sums.largest + jnp.log(sums.total)
        log_probs = jnp.sum(state * own, -1) / temperature - normaliser
        if sums.rows is None:
            return (log_probs, None), None
        mean = sums.rows / sums.total[:, None]
        # the mean logit is that of the mean row
        entropy = normaliser - jnp.sum(state * mean, -1) / temperature if with_entropy else None
        return (log_probs, entropy), ((own - mean) / temperature).astype(hidden.dtype)

    @jax.custom_vjp
    def scores(hidden: Array, tokens: Array) -> tuple[Array, Array | None]:
        return results(hidden, tokens, with_rows=with_entropy)[0]

    def forward(hidden: Array, tokens: Array) -> tuple[tuple[Array, Array | None], Array | None]:
        return results(hidden, tokens, with_rows=True)

    def backward(slopes: Array, cotangents: tuple[Array, Array | None]) -> tuple[Array, None]:
        return (cotangents[0][:, None] * slopes).astype(slopes.dtype), None

    scores.defvjp(forward, backward)
    return scores(hidden, tokens)
