"""Which of the model's parts are the captioner's and the transformer's weights: as trained, or as the reference."""

from collections.abc import Mapping
from typing import Any

import jax

from uae_jax import trees
from uae_jax.nn import int8

Parts = Mapping[str, Any]
CAPTIONER = ("vision", "language", "projector")
SCALES = "_scales"  # behind the name of a frozen part whose kernels have 8 bits
EIGHT_BITS = ("transformer", "text_encoder")


def captioner_weights(parts: Parts, *, policy: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters of the captioner, those of `CAPTIONER` that there are, and its adapter.

    Args:
      parts: the model's dictionary.
      policy: the trained captioner, or the reference (adapter off), which is also UAE's text encoder.
    """
    params = {name: parts[name] for name in CAPTIONER if name in parts}
    if not policy:
        return params, None
    if "language_policy" in parts:
        return params | {"language": parts["language_policy"]}, None
    return params, parts.get("language_lora")


def frozen_weights(parts: Parts, name: str) -> dict[str, Any]:
    """Flax variables of a part as it was read, with the scales of its kernels where they have 8 bits."""
    scales = parts.get(f"{name}{SCALES}")
    return {"params": parts[name]} | ({} if scales is None else {int8.SCALES: scales})


def eight_bits(parts: dict[str, Any]) -> None:
    """Replaces the kernels of the decoder's parts by integers of 8 bits, one leaf after the other, where they are not.

    Each output of a kernel has its own scale; embeddings, biases and norms stay as they are.
    """
    for name in EIGHT_BITS:
        if name in parts and f"{name}{SCALES}" not in parts:
            leaves, scales = trees.flatten(parts.pop(name)), {}
            for kernel in [leaf for leaf in leaves if leaf.endswith("/kernel")]:
                # compiled, so that no copy in float32 is made
                leaves[kernel], scales[kernel] = jax.jit(int8.quantised_kernel)(leaves.pop(kernel))
            parts[name], parts[f"{name}{SCALES}"] = trees.unflatten(leaves), trees.unflatten(scales)


def transformer_weights(parts: Parts, *, policy: bool) -> dict[str, Any]:
    """Flax variables of the transformer: the trained one, or the reference (adapter off)."""
    if policy and "transformer_policy" in parts:
        return {"params": parts["transformer_policy"]}
    variables = frozen_weights(parts, "transformer")
    if not policy:
        return variables
    return variables | {"lora": parts["transformer_lora"]} if "transformer_lora" in parts else variables
