"""Attention in plain XLA: the formula itself, and two forms that bound its memory.

All have logits and softmax in float32 and divide by the square root of the head width (arXiv 1706.03762, eq. 1), with
grouped queries (arXiv 2305.13245). Shapes as in the entry point: `[B, T, H, K]` queries, `[B, S, H', K]` keys and
values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.nn.attention.mask import MASKED, Mask, SharedKeys

TOGETHER = 2**20  # weights (4 MB in float32) of the units that `by_head` has in one turn of its loop


def heads_first(query: Array, key_heads: int) -> Array:
    """Queries `[B, H', H / H', T, K]`, those that share a key head together."""
    batch, length, heads, width = query.shape
    return query.reshape(batch, length, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)


def _tokens_first(mixed: Array, shape: tuple[int, ...]) -> Array:
    return mixed.transpose(0, 3, 1, 2, 4).reshape(shape)


def _weights(logits: Array, allowed: Array | None, width: int, dtype: jnp.dtype) -> Array:
    logits = logits * width**-0.5
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


def plain(query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """The formula, with all `[B, H, T, S]` weights at once."""
    length, size, width = query.shape[1], key.shape[1], query.shape[-1]
    grouped, keys, values = heads_first(query, key.shape[2]), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bhrtk,bhsk->bhrts", grouped, keys, preferred_element_type=jnp.float32)
    allowed = mask.pairs(length, size)
    weights = _weights(logits, None if allowed is None else allowed[:, None, None], width, value.dtype)
    return _tokens_first(jnp.einsum("bhrts,bhsk->bhrtk", weights, values), query.shape)


def plain_with_shared(query: Array, key: Array, value: Array, mask: Mask, shared: tuple[SharedKeys, ...]) -> Array:
    """`plain` over shared and own keys under one softmax.

    The rows that share keys are folded into its query axis, so that those keys are read once and never repeated.
    """
    rows, length, heads, width = query.shape
    own = jnp.broadcast_to(mask.pairs(length, length), (rows, length, length))
    parts = [(m.key, m.value, jnp.repeat(m.valid[:, None], rows // len(m.key), axis=0)) for m in shared]
    logits, allowed = [], []
    for keys, _, valid in [*parts, (key, value, own)]:
        entries, size, key_heads, _ = keys.shape
        grouped = query.reshape(entries, rows // entries, length, key_heads, heads // key_heads, width)
        part = jnp.einsum("mgthrk,mshk->mghrts", grouped, keys.astype(query.dtype), preferred_element_type=jnp.float32)
        logits.append(part.reshape(rows, key_heads, -1, length, size))
        allowed.append(jnp.broadcast_to(valid, (rows, length, size)))
    weights = _weights(jnp.concatenate(logits, -1), jnp.concatenate(allowed, -1)[:, None, None], width, query.dtype)
    mixed, start = jnp.zeros((), query.dtype), 0
    for values in (*(m.value for m in shared), value):
        entries, size, key_heads, _ = values.shape
        part = weights[..., start : start + size].reshape(entries, rows // entries, key_heads, -1, length, size)
        out = jnp.einsum("mghrts,mshk->mgthrk", part, values.astype(query.dtype))
        mixed, start = mixed + out.reshape(query.shape), start + size
    return mixed


def by_query_blocks(query: Array, key: Array, value: Array, mask: Mask, block: int = 512) -> Array:
    """`plain` for `block` queries at a time, weights recomputed in the backward pass: memory `[B, H, block, S]`.

    Batch and heads stay whole, so that they may be sharded.
    """
    batch, length, _, width = query.shape
    size, key_heads = key.shape[1:3]
    pieces = -(-length // block)
    room = pieces * block - length
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    grouped = jnp.pad(heads_first(query, key_heads), ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
    grouped = jnp.moveaxis(grouped.reshape(*grouped.shape[:3], pieces, block, width), 3, 0)
    segments = mask.segments(length, batch, size)

    @jax.checkpoint
    def piece(index: Array, part: Array) -> Array:
        logits = jnp.einsum("bhrtk,bhsk->bhrts", part, keys, preferred_element_type=jnp.float32)
        allowed = _block_pairs(mask.causal, segments, index * block, block, length, size)
        weights = _weights(logits, None if allowed is None else allowed[:, None, None], width, value.dtype)
        return jnp.einsum("bhrts,bhsk->bhrtk", weights, values)

    mixed = jax.lax.map(lambda x: piece(*x), (jnp.arange(pieces), grouped))
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(batch, key_heads, -1, pieces * block, width)
    return _tokens_first(mixed[..., :length, :], query.shape)


def _block_pairs(
    causal: bool, segments: tuple[Array, Array] | None, start: Array, block: int, length: int, size: int
) -> Array | None:
    """Rows `start` to `start + block` of the mask, `[B or 1, block, S]`; rows past the end repeat the last one's
    ids.
    """
    rows = jnp.minimum(start + jnp.arange(block), length - 1)
    table = None
    if causal:
        table = (jnp.arange(size)[None] <= rows[:, None] + size - length)[None]
    if segments is not None:
        same = jnp.take(segments[0], rows, axis=1)[:, :, None] == segments[1][:, None]
        table = same if table is None else table & same
    return table


def by_head(query: Array, key: Array, value: Array, mask: Mask, block: int = 512) -> Array:
    """Two-dimensional matrix products, each of one row of the batch, one key head and at most `block` queries.

    What CPUs are fastest with. Several of these independent units stand side by side in one turn of a loop, where XLA's
    CPU backend runs them on several cores at once; products are divided by the softmax's sums, not weights, of which
    there are more. Weights are recomputed in the backward pass: memory `[H / H', block, S]` a unit, units of `TOGETHER`
    weights a turn.
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

    def unit(queries: Array, start: Array | int, keys: Array, values: Array, masks: tuple) -> Array:
        valid, segments = jax.tree.map(lambda row: row[None], masks)
        logits = jnp.dot(queries, keys, preferred_element_type=jnp.float32) * width**-0.5
        allowed = _block_pairs(mask.causal, segments, start, block, length, size)
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
    return _tokens_first(mixed.reshape(batch, key_heads, ratio, pieces * block, width)[..., :length, :], query.shape)


def _in_turns(function: Callable[..., Array], weights: int, parts: tuple) -> Array:
    """`function` of each entry of the parts, `[N, ...]`: up to eight in one turn of a loop as long as their weights fit
    `TOGETHER`.
    """
    count = len(parts[0])
    together = max(n for n in range(1, 9) if count % n == 0 and (n == 1 or n * weights <= TOGETHER))

    @jax.checkpoint
    def turn(entries: tuple) -> Array:
        return jnp.stack([function(*jax.tree.map(lambda leaf: leaf[index], entries)) for index in range(together)])

    if count == together:
        return turn(parts)
    results = jax.lax.map(turn, jax.tree.map(lambda leaf: leaf.reshape(-1, together, *leaf.shape[1:]), parts))
    return results.reshape(count, *results.shape[2:])
