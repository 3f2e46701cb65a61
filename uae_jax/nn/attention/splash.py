"""Attention on TPUs: JAX's splash kernels in Pallas, which never store the weights and skip forbidden blocks."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float

from uae_jax.nn.attention.mask import Mask

LANES = 128  # the kernels' unit of sequence and head width
LARGEST_BLOCK = 896
# the backward kernels hold more arrays of a block on the chip, and wide heads longer ones
LARGEST_OTHERS = 512


def block_size(length: int, width: int = LANES) -> int:
    """The block of a sequence: the fewest blocks of at most 896, and no longer than these need to be.

    704 keys are one block of 768, and 1568 two of 896; blocks of 512 would pad them to 1024 and 2048. Heads wider than
    128 have blocks of at most 512.
    """
    pieces = -(-length // (LARGEST_BLOCK if width <= LANES else LARGEST_OTHERS))
    return -(-length // (pieces * LANES)) * LANES


def backward_block(padded: int) -> int:
    """The largest block of the backward kernels that divides a padded length."""
    return max(size for size in range(LANES, LARGEST_OTHERS + 1, LANES) if padded % size == 0)


@functools.cache
def _blocks(query: int, key: int, padded: tuple[int, int]) -> kernels.BlockSizes:
    query_back, key_back = (backward_block(length) for length in padded)
    return kernels.BlockSizes(
        block_q=query,
        block_kv=key,
        block_kv_compute=key,
        block_q_dkv=query_back,
        block_kv_dkv=key_back,
        block_kv_dkv_compute=key_back,
        block_q_dq=query_back,
        block_kv_dq=key_back,
    )


def _padded(x: Array, axis: int, multiple: int) -> Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, room)


def splash(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s j k"],
    value: Float[Array, "b s j k"],
    mask: Mask,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """Attention as in `plain.plain`; all sizes are padded to what the kernels take.

    `interpret` runs the kernels step by step on any device, for tests.
    """
    batch, length, heads, width = query.shape
    size = key.shape[1]
    q_block, k_block = block_size(length, width), block_size(size, width)
    scaled = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    q, k, v = (
        _padded(_padded(x.transpose(0, 2, 1, 3), 2, block), 3, LANES)
        for x, block in ((scaled, q_block), (key, k_block), (value, k_block))
    )
    shape = (q.shape[2], k.shape[2])
    one = kernels.CausalMask(shape, size - length) if mask.causal else kernels.FullMask(shape)
    ids = mask.segments(length, batch, size)
    if ids is None and (shape[1] > size and not mask.causal or size < length):
        ids = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, size), jnp.int32)
    if ids is not None:
        # padding of the kernel: queries that are dropped, and keys that no query sees
        rooms = [((0, 0), (0, padded - there)) for padded, there in zip(shape, (length, size))]
        ids = kernels.SegmentIds(*(jnp.pad(x, room, constant_values=c) for x, room, c in zip(ids, rooms, (-1, -2))))
    attend = kernels.make_splash_mha(
        kernels.MultiHeadMask([one] * heads),
        block_sizes=_blocks(q_block, k_block, shape),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    mixed = jax.vmap(attend)(q, k, v, ids) if ids is not None else jax.vmap(attend)(q, k, v)
    mixed = cast(Array, mixed)  # without the residuals that kernels can return, too
    return mixed[:, :, :length, :width].transpose(0, 2, 1, 3)
