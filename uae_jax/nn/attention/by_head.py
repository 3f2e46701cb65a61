"""Attention on CPUs: two-dimensional matrix products, several side by side in one turn of a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.nn.attention.mask import MASKED, Mask
from uae_jax.nn.attention.plain import block_pairs, heads_first, tokens_first

TOGETHER = 2**20  # weights (4 MB in float32) of the units in one turn of the loop


def by_head(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s j k"],
    value: Float[Array, "b s j k"],
    mask: Mask,
    block: int = 512,
) -> Float[Array, "b t h k"]:
    """Two-dimensional matrix products, each of one row of the batch, one key head and at most `block` queries.

    CPUs are fastest with these products. Several of these independent units stand side by side in one turn of a loop,
    where XLA's CPU backend runs them on several cores at once. The sums of the softmax divide the products, which are
    fewer than the weights. The backward pass recomputes the weights: memory `[H / J, block, S]` a unit, units of
    `TOGETHER` weights a turn.
    """
    batch, length, _, width = query.shape
    size, key_heads = key.shape[1:3]
    block = min(block, length)
    pieces = -(-length // block)
    grouped = heads_first(query, key_heads)
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, pieces * block - length), (0, 0)))
    ratio, heads = grouped.shape[2], batch * key_heads
    grouped = grouped.reshape(batch, key_heads, ratio, pieces, block, width).transpose(0, 1, 3, 2, 4, 5)
    valid = mask.valid if mask.groups is None else None  # one line for all queries
    segments = None if mask.groups is None else mask.segments(length, batch, size)
    keys, values = (
        key.transpose(0, 2, 3, 1).reshape(heads, width, size),
        value.transpose(0, 2, 1, 3).reshape(heads, size, width),
    )
    per_head = jax.tree.map(lambda rows: jnp.repeat(rows, key_heads, axis=0), (valid, segments))

    def unit(queries: Array, start: Array | int, keys: Array, values: Array, masks: tuple[Any, Any]) -> Array:
        valid, segments = jax.tree.map(lambda row: row[None], masks)
        logits = jnp.dot(queries, keys, preferred_element_type=jnp.float32) * width**-0.5
        allowed = block_pairs(mask.causal, segments, start, block, length, size)
        if allowed is not None:
            logits = jnp.where(allowed, logits.reshape(ratio, block, size), MASKED).reshape(logits.shape)
        if valid is not None:
            logits = jnp.where(valid, logits, MASKED)
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        mixed = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)

    def head(queries: Array, *others: Any) -> Array:
        return _in_turns(
            lambda part, start: unit(part, start, *others), ratio * block * size, (queries, block * jnp.arange(pieces))
        )

    parts = (grouped.reshape(heads, pieces, ratio * block, width), keys, values, per_head)
    if pieces == 1:
        mixed = _in_turns(lambda queries, *others: unit(queries[0], 0, *others), ratio * block * size, parts)
    else:
        mixed = jax.lax.map(lambda entry: head(*entry), parts)
    mixed = mixed.reshape(batch, key_heads, pieces, ratio, block, width).transpose(0, 1, 3, 2, 4, 5)
    return tokens_first(mixed.reshape(batch, key_heads, ratio, pieces * block, width)[..., :length, :], query.shape)


def _in_turns(function: Callable[..., Array], weights: int, parts: tuple[Any, ...]) -> Array:
    """`function` of each entry of the parts, `[N, ...]`: up to eight in one turn of a loop as long as their weights fit
    `TOGETHER`.
    """
    count = len(parts[0])
    together = max(n for n in range(1, 9) if count % n == 0 and (n == 1 or n * weights <= TOGETHER))

    @jax.checkpoint
    def turn(entries: tuple[Any, ...]) -> Array:
        return jnp.stack([function(*jax.tree.map(lambda leaf: leaf[index], entries)) for index in range(together)])

    if count == together:
        return turn(parts)
    results = jax.lax.map(turn, jax.tree.map(lambda leaf: leaf.reshape(-1, together, *leaf.shape[1:]), parts))
    return results.reshape(count, *results.shape[2:])
