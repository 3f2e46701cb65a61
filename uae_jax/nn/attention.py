"""The one attention function of all models."""

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a row without any allowed key gives a mean of values and no NaN


def attention(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    """Softmax attention with grouped queries; logits and softmax in float32 (arXiv 1706.03762, eq. 1; 2305.13245).

    Args:
      query: `[B, T, H, K]`.
      key: `[B, S, H', K]` where H' divides H; query head h reads key head h // (H / H').
      value: `[B, S, H', K]`.
      mask: bool, broadcastable to `[B, 1, T, S]`; False forbids. None allows all.

    Returns:
      `[B, T, H, K]` in the precision of `query`.

    Raises:
      ValueError: the number of key heads does not divide the number of query heads.
    """
    batch, length, heads, width = query.shape
    key_heads = key.shape[2]
    if heads % key_heads:
        raise ValueError(f"{heads} query heads cannot share {key_heads} key heads")
    grouped = query.reshape(batch, length, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)
    keys, values = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bhrtk,bhsk->bhrts", grouped, keys, preferred_element_type=jnp.float32) * width**-0.5
    if mask is not None:
        logits = jnp.where(mask[:, :, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bhrts,bhsk->bhrtk", weights, values)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
