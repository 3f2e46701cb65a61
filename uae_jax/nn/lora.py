"""Adapter trees for `nn.linear.Dense`: made, merged, counted (LoRA, arXiv 2106.09685)."""

import re

import jax
import jax.numpy as jnp

from uae_jax import trees


def init_lora(key: jax.Array, params: trees.Tree, pattern: str, rank: int) -> dict:
    """A new adapter whose product is zero, so that the adapted model equals the base bit for bit.

    Args:
      key: random key; each leaf folds in its own name.
      params: base parameters, arrays or shapes; kernels are `[in, out]`, or `[L, in, out]` when layers are stacked.
      pattern: regular expression for the whole module name, such as `layers/.*` (without `/kernel`).
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


def merge_lora(params: trees.Tree, adapter: trees.Tree, alpha: float) -> dict:
    """The base with `alpha / rank * a @ b` added to each adapted kernel, in float32.

    Raises:
      KeyError: the adapter names a module that the base does not have.
    """
    merged = trees.flatten(params)
    parts = trees.flatten(adapter)
    for name, a in parts.items():
        module, _, last = name.rpartition("/")
        if last != "a":
            continue
        kernel = merged[f"{module}/kernel"]
        delta = alpha / a.shape[-1] * jnp.matmul(a, parts[f"{module}/b"], precision="highest")
        merged[f"{module}/kernel"] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return trees.unflatten(merged)
