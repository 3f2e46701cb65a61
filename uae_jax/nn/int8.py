"""Kernels of 8 bits for sampling, where every token reads all weights and the memory's bandwidth is the bound."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

SCALES = "int8_scales"  # the variable collection of `Dense`
LARGEST = 127


def quantised_kernel(
    kernel: Float[Array, "*layers fan_in fan_out"],
) -> tuple[Int8[Array, "*layers fan_in fan_out"], Float[Array, "*layers fan_out"]]:
    """A kernel as integers and a scale of each output: `kernel` is nearly `integers * scale`.

    The error of a weight is at most half a scale, 1/254 of the largest weight of its output.
    """
    scale = jnp.max(jnp.abs(kernel), axis=-2).astype(jnp.float32) / LARGEST
    steps = kernel.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)[..., None, :]
    return jnp.rint(steps).astype(jnp.int8), scale


def quantised(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's parameters with its kernels quantised, and the scales in a tree of the same paths."""
    values, scales = {}, {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            values[name], found = quantised(child)
            scales |= {name: found} if found else {}
        elif name == "kernel":
            values[name], scales[name] = quantised_kernel(child)
        else:
            values[name] = child
    return values, scales
