"""Attention in plain XLA: the formula itself, and a form that bounds its memory.

All have logits and softmax in float32 and divide by the square root of the head width (arXiv 1706.03762, eq. 1), with
grouped queries (arXiv 2305.13245). Shapes as in the entry point: J is the number of key heads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uae_jax.nn.attention.mask import MASKED, Mask, SharedKeys


def heads_first(query: Float[Array, "b t h k"], key_heads: int) -> Float[Array, "b {key_heads} ratio t k"]:
    """Queries that share a key head together: ratio = H / J."""
    batch, length, heads, width = query.shape
    return query.reshape(batch, length, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)


def tokens_first(mixed: Float[Array, "b j ratio t k"], shape: tuple[int, ...]) -> Float[Array, "b t h k"]:
    """The inverse of `heads_first`, to the shape `[B, T, H, K]`."""
    return mixed.transpose(0, 3, 1, 2, 4).reshape(shape)


def _weights(logits: Array, allowed: Array | None, width: int, dtype: jnp.dtype) -> Array:
    logits = logits * width**-0.5
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED)
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


def plain(
    query: Float[Array, "b t h k"], key: Float[Array, "b s j k"], value: Float[Array, "b s j k"], mask: Mask
) -> Float[Array, "b t h k"]:
    """The formula, with all `[B, H, T, S]` weights at once."""
    length, size, width = query.shape[1], key.shape[1], query.shape[-1]
    grouped, keys, values = heads_first(query, key.shape[2]), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bhrtk,bhsk->bhrts", grouped, keys, preferred_element_type=jnp.float32)
    allowed = mask.pairs(length, size)
    weights = _weights(logits, None if allowed is None else allowed[:, None, None], width, value.dtype)
    return tokens_first(jnp.einsum("bhrts,bhsk->bhrtk", weights, values), query.shape)


def plain_with_shared(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t j k"],
    value: Float[Array, "b t j k"],
    mask: Mask,
    shared: tuple[SharedKeys, ...],
) -> Float[Array, "b t h k"]:
    """`plain` over shared and own keys under one softmax.

    The rows that share keys are folded into its query axis, so that those keys are read once and never repeated.
    """
    rows, length, heads, width = query.shape
    own = mask.table(rows, length, length)
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


def by_query_blocks(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s j k"],
    value: Float[Array, "b s j k"],
    mask: Mask,
    block: int = 512,
) -> Float[Array, "b t h k"]:
    """`plain` for `block` queries at a time, weights recomputed in the backward pass: memory `[B, H, block, S]`.

    Batch and heads are not split, so that they may be sharded.
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
    causal: bool,
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None,
    start: Int[Array, ""] | int,
    block: int,
    length: int,
    size: int,
) -> Bool[Array, "#b {block} {size}"] | None:
    """Rows `start` to `start + block` of the mask; rows past the end repeat the ids of the last row."""
    rows = jnp.minimum(start + jnp.arange(block), length - 1)
    table = None
    if causal:
        table = (jnp.arange(size)[None] <= rows[:, None] + size - length)[None]
    if segments is not None:
        same = jnp.take(segments[0], rows, axis=1)[:, :, None] == segments[1][:, None]
        table = same if table is None else table & same
    return table
