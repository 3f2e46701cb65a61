"""Loops over layers, and over pieces of the work."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from uae_jax.nn import int8
from uae_jax.nn.remat import remat

Carry = TypeVar("Carry")
Piece = TypeVar("Piece")
Result = TypeVar("Result")
Layer = TypeVar("Layer", bound=nn.Module)


def scan(step: Callable[[Carry, Piece], tuple[Carry, Result]], carry: Carry, pieces: Piece) -> tuple[Carry, Result]:
    """`jax.lax.scan` over pieces `[N, ...]`, without a loop where there is a single piece.

    XLA's CPU backend is slower inside of a loop: the kernel's gradient of a convolution of 64 channels takes 1 s in
    place of .06. `unroll=True` leaves a loop of one turn, whose convolutions stay slow after XLA has removed it.
    """
    if len(jax.tree.leaves(pieces)[0]) > 1:
        return lax.scan(step, carry, pieces)
    carry, result = step(carry, jax.tree.map(lambda leaf: leaf[0], pieces))
    return carry, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], result)


def scan_layers(layer: type[Layer], length: int, policy: str = "none", in_axes: Any = nn.broadcast) -> type[Layer]:
    """A layer repeated over stacked parameters and adapters `[L, ...]`.

    Args:
      layer: its call takes what is carried and further arguments, and returns (carry, a result of this layer or None).
      length: number of layers.
      policy: what the backward pass recomputes, a name of `remat.POLICIES`.
      in_axes: of the further arguments: 0 for one entry a layer, `nn.broadcast` for what all layers share.
    """
    return nn.scan(
        remat(layer, policy),
        variable_axes={"params": 0, "lora": 0, int8.SCALES: 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
    )
