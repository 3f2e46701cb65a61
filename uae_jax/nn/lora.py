"""Adapter trees for `nn.linear.Dense`: made and merged (LoRA, arXiv 2106.09685)."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Key

from uae_jax import trees


def init_lora(key: Key[Array, ""], params: trees.Tree, pattern: str, rank: int) -> dict[str, Any]:
    """A new adapter whose product is zero, so that the adapted model equals the base bit for bit.

    Args:
      key: random key; each leaf folds in its own name.
      params: base parameters, arrays or shapes; kernels are `[in, out]`, or `[L, in, out]` when layers are stacked.
      pattern: regular expression for the complete module name, such as `layers/.*` (without `/kernel`).
      rank: inner width of the adapter.

    Returns:
      A tree with `a` (`[..., in, rank]`, normal of standard deviation 1/rank as in peft's `gaussian`) and
      `b` (`[..., rank, out]`, zeros) for each matching module.

    Raises:
      ValueError: no kernel matches the pattern.
    """
    leaves = {}
    for name, kernel in trees.flatten(params).items():
        module, _, last = name.rpartition("/")
        if last != "kernel" or not re.fullmatch(pattern, module):
            continue
        *stack, fan_in, fan_out = kernel.shape
        noise = jax.random.normal(trees.name_key(key, module), (*stack, fan_in, rank), jnp.float32)
        leaves[f"{module}/a"] = noise / rank
        leaves[f"{module}/b"] = jnp.zeros((*stack, rank, fan_out), jnp.float32)
    if not leaves:
        raise ValueError(f"no linear layer matches the adapter pattern {pattern!r}")
    return trees.unflatten(leaves)


def merge_adapter(params: trees.Tree, adapter: trees.Tree, alpha: float) -> dict[str, Any]:
    """The base with `alpha / rank * a @ b` added to each adapted kernel (LoRA, arXiv 2106.09685, section 4.1).

    The arithmetic is float32 and the stored precision is kept. Arrays of the host are merged on the host, one layer at
    a time. Arrays of a device keep their sharding.

    Args:
      params: kernels are `[in, out]`, or `[L, in, out]` when layers are stacked.
      adapter: `a` `[..., in, rank]` and `b` `[..., rank, out]` for some modules of `params`.
      alpha: numerator of the scale.

    Raises:
      KeyError: the adapter names a module that the base does not have.
    """
    merged = trees.flatten(params)
    parts = trees.flatten(adapter)
    for name, a in parts.items():
        module, _, last = name.rpartition("/")
        if last == "a":
            kernel, b = merged[f"{module}/kernel"], parts[f"{module}/b"]
            scale = alpha / a.shape[-1]
            if isinstance(kernel, jax.Array):
                merged[f"{module}/kernel"] = _add_on_device(kernel, a, b, scale)
            else:
                merged[f"{module}/kernel"] = _add_on_host(kernel, a, b, scale)
    return trees.unflatten(merged)


def _add_on_device(kernel: Array, a: Array | np.ndarray, b: Array | np.ndarray, scale: float) -> Array:
    delta = scale * jnp.matmul(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), precision="highest")
    total = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return total if isinstance(kernel, core.Tracer) else jax.device_put(total, kernel.sharding)


def _add_on_host(kernel: np.ndarray, a: Array | np.ndarray, b: Array | np.ndarray, scale: float) -> np.ndarray:
    total, left, right = np.empty(kernel.shape, kernel.dtype), np.asarray(a), np.asarray(b)
    for layer in np.ndindex(kernel.shape[:-2]):
        delta = scale * (left[layer].astype(np.float32) @ right[layer].astype(np.float32))
        total[layer] = kernel[layer].astype(np.float32) + delta
    return total
