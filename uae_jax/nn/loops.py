"""Loops over pieces of the work."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

Carry, Piece, Result = TypeVar("Carry"), TypeVar("Piece"), TypeVar("Result")


def scan(step: Callable[[Carry, Piece], tuple[Carry, Result]], carry: Carry, pieces: Piece) -> tuple[Carry, Result]:
    """`jax.lax.scan` over pieces `[N, ...]`; a single step is unrolled.

    XLA's CPU backend runs what is inside loops with fewer threads.
    """
    return lax.scan(step, carry, pieces, unroll=len(jax.tree.leaves(pieces)[0]) == 1)
