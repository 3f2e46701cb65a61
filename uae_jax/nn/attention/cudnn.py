"""Attention on NVIDIA GPUs: cuDNN's fused kernels, which never store the weights."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uae_jax.nn.attention.mask import Mask

LARGEST_WIDTH = 128  # of a head, on every generation that cuDNN's kernels know
OLDEST = (8, 0)  # compute capability, Ampere


def supported(query: Array | jax.ShapeDtypeStruct, capability: tuple[int, int] = OLDEST) -> bool:
    """Whether the kernels take queries `[B, T, H, K]` of this precision and head width on a GPU of this compute
    capability.
    """
    width = query.shape[-1]
    return (
        capability >= OLDEST
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and width <= LARGEST_WIDTH
        and width % 8 == 0
    )


def arguments(mask: Mask, batch: int, length: int, size: int) -> dict[str, Any]:
    """The mask in the kernels' terms: lengths where its valid keys come first, else a table `[B, 1, T, S]`.

    Args:
      mask: what is allowed.
      batch, length, size: B, T, S.

    Returns:
      Keyword arguments of `jax.nn.dot_product_attention`: of `is_causal`, `key_value_seq_lengths` and `mask`.
    """
    if mask.groups is None and (mask.valid is None or mask.right_padded) and (not mask.causal or length == size):
        found: dict[str, Any] = {"is_causal": mask.causal}
        if mask.valid is not None:
            # a row without keys would divide by zero; it takes the first key, and its result is not used
            found["key_value_seq_lengths"] = jnp.maximum(jnp.sum(mask.valid, axis=1, dtype=jnp.int32), 1)
        return found
    return {"mask": mask.table(batch, length, size)[:, None]}


def cudnn(
    query: Float[Array, "b t h k"], key: Float[Array, "b s j k"], value: Float[Array, "b s j k"], mask: Mask
) -> Float[Array, "b t h k"]:
    """Attention as in `plain.plain`; see `supported`.

    JAX refuses odd lengths where there is a gradient, with or without a table. They are padded here, which copies the
    operand. Callers that can choose take an even length (`entry.preferred_length`).
    """
    batch, length, size = query.shape[0], query.shape[1], key.shape[1]
    found = arguments(mask, batch, length, size)
    query, key, value = (_even(x, 1) for x in (query, key, value))
    if "mask" in found:
        found["mask"] = _even(_even(found["mask"], 2), 3)
    elif size % 2 and not mask.causal:  # a causal mask hides the padding from every query but its own
        found.setdefault("key_value_seq_lengths", jnp.full(batch, size, jnp.int32))
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **found)[:, :length]


def _even(x: Array, axis: int) -> Array:
    """Zeros, or False, behind an axis of odd length."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, x.shape[axis] % 2)
    return jnp.pad(x, room) if x.shape[axis] % 2 else x
