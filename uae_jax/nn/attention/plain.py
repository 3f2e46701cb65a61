"""Attention in plain XLA: the formula itself, and a form that bounds its memory.

All have logits and softmax in float32 and divide by the square root of the head width (arXiv 1706.03762, eq. 1), with
grouped queries (arXiv 2305.13245). Shapes as in the entry point: `[B, T, H, K]` queries, `[B, S, H', K]` keys and
values.
"""

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.nn.attention.mask import MASKED, Mask, SharedKeys


def heads_first(query: Array, key_heads: int) -> Array:
    """Queries `[B, H', H / H', T, K]`, those that share a key head together."""
    batch, length, heads, width = query.shape
    return query.reshape(batch, length, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)


def tokens_first(mixed: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `heads_first`, to the shape `[B, T, H, K]`."""
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
    return tokens_first(jnp.einsum("bhrts,bhsk->bhrtk", weights, values), query.shape)


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
        allowed = block_pairs(mask.causal, segments, index * block, block, length, size)
        weights = _weights(logits, None if allowed is None else allowed[:, None, None], width, value.dtype)
        return jnp.einsum("bhrts,bhsk->bhrtk", weights, values)

    mixed = jax.lax.map(lambda x: piece(*x), (jnp.arange(pieces), grouped))
    mixed = jnp.moveaxis(mixed, 0, 3).reshape(batch, key_heads, -1, pieces * block, width)
    return tokens_first(mixed[..., :length, :], query.shape)


def block_pairs(
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
