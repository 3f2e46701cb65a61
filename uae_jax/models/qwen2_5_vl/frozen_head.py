"""Scores of tokens under a head that is not trained, the vocabulary a block at a time, with their gradient by the
hidden states.

The gradient of a log-probability by its own hidden state is the token's row of the head less the mean row under the
distribution: an attention of hidden states over the vocabulary, with the head as keys and values. It is summed as in
  arXiv 2205.14135, section 3.1, in
the one pass that makes the logits: each block of the head is read once, and no logits are kept or computed again.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.nn.attention.mask import MASKED
from uae_jax.nn.constrain import constrain, ways
from uae_jax.nn.loops import scan


class _Sums(NamedTuple):
    """Of the blocks so far, float32: the largest logit and the sum of weights `[N]`, the weighted rows of the head `[N,
    D]` or None.
    """

    largest: Array
    total: Array
    rows: Array | None


class Blocks(NamedTuple):
    """A head in blocks of its vocabulary; each holds a piece of what every device along the axis `vocab` has.

    Attributes:
      head: `[W, blocks, S, D]` where tied, else `[D, W, blocks, S]`; W devices, S tokens of each in a block.
      tied: whether it is a table of embeddings.
      vocabulary: tokens; what is beyond is padding.
    """

    head: Array
    tied: bool
    vocabulary: int

    @classmethod
    def cut(cls, head: Array, tied: bool, blocks: int) -> "Blocks":
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
        return self.head.shape[:3] if self.tied else self.head.shape[1:]

    def block(self, index: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """One block, `[W S, D]` or `[D, W S]`, and its tokens `[W S]`."""
        devices, blocks, size = self.shape
        tokens = jnp.arange(devices)[:, None] * (blocks * size) + index * size + jnp.arange(size)
        part = jax.lax.dynamic_index_in_dim(self.head, index, 1 if self.tied else 2, keepdims=False).astype(dtype)
        shape = (devices * size, -1) if self.tied else (-1, devices * size)
        return part.reshape(shape), tokens.reshape(-1)


def _pass(blocks: Blocks, hidden: Array, temperature: float | Array, with_rows: bool) -> _Sums:
    """The sums over the whole vocabulary; `hidden` `[N, D]`."""
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
        if with_rows:
            rows = sums.rows * shrink[:, None] + product(f"nv,{letters}->nd", weights.astype(hidden.dtype), part)
        return _Sums(largest, sums.total * shrink + jnp.sum(weights, -1), rows), None

    zero = jnp.zeros(len(hidden), jnp.float32)
    start = _Sums(zero + MASKED, zero, jnp.zeros(hidden.shape, jnp.float32) if with_rows else None)
    return scan(add, start, jnp.arange(blocks.shape[1]))[0]


def frozen_head_scores(
    head: Array,
    tied: bool,
    hidden: Array,
    tokens: Array,
    *,
    temperature: float | Array,
    blocks: int,
    with_entropy: bool,
) -> tuple[Array, Array | None]:
    """Log-probabilities of tokens; their gradient by the hidden states is taken along with them.

    Args:
      head: the table `[V, D]` of a tied head, or the matrix `[D, V]`; it gets no gradient.
      tied: which of the two.
      hidden: `[N, D]`, the states that predict the tokens.
      tokens: int `[N]`.
      temperature: positive; logits are divided by it.
      blocks: of the vocabulary; logits `[N, V / blocks]` exist at once.
      with_entropy: whether entropies are computed too.

    Returns:
      Float32 `[N]` each; the entropy, in nats, has no gradient, or is None.
    """
    cut = Blocks.cut(head, tied, blocks)

    def results(hidden: Array, tokens: Array, with_rows: bool) -> tuple[tuple[Array, Array | None], Array | None]:
        """Scores, and their slopes `[N, D]` if the head's rows are summed."""
        own = jnp.take(head, tokens, axis=0) if tied else jnp.take(head, tokens, axis=1).T
        own = constrain(own, "batch").astype(hidden.dtype).astype(jnp.float32)
        sums, state = _pass(cut, hidden, temperature, with_rows), hidden.astype(jnp.float32)
        normaliser = sums.largest + jnp.log(sums.total)
        log_probs = jnp.sum(state * own, -1) / temperature - normaliser
        if not with_rows:
            return (log_probs, None), None
        mean = sums.rows / sums.total[:, None]
        # the mean logit is that of the mean row
        entropy = normaliser - jnp.sum(state * mean, -1) / temperature if with_entropy else None
        return (log_probs, entropy), ((own - mean) / temperature).astype(hidden.dtype)

    @jax.custom_vjp
    def scores(hidden: Array, tokens: Array) -> tuple[Array, Array | None]:
        return results(hidden, tokens, with_rows=with_entropy)[0]

    def forward(hidden: Array, tokens: Array) -> tuple[tuple[Array, Array | None], Array]:
        return results(hidden, tokens, with_rows=True)

    def backward(slopes: Array, cotangents: tuple[Array, Array | None]) -> tuple[Array, None]:
        return (cotangents[0][:, None] * slopes).astype(slopes.dtype), None

    scores.defvjp(forward, backward)
    return scores(hidden, tokens)
