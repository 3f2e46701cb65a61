"""Parts of a program that a single CPU compiles separately."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata

from uae_jax.nn.device import on_one_cpu


def separately(function: Callable[..., Any], *arguments: Array, **settings: Any) -> Any:
    """`function(*arguments, **settings)`; on a single CPU nothing inside is fused with anything outside.

    The CPU backend drops `optimization_barrier` before it fuses (jax 0.10.2). It keeps a call that may not be inlined.

    Args:
      function: of a module, so that equal calls are traced and compiled once.
      arguments: arrays.
      settings: hashable.
    """
    if not on_one_cpu():
        return function(*arguments, **settings)
    with set_xla_metadata(inlineable="false"):
        return jax.jit(_unmarked(function), static_argnames=tuple(settings))(*arguments, **settings)


def materialised(x: Array) -> Array:
    """The same array behind a barrier, so that it is computed once.

    The CPU backend would fuse the computation of `x` into each reader, once for every element read. On a single CPU the
    barrier is a separate call: JAX would see through a call that returns its argument.
    """
    return separately(lax.optimization_barrier, x)


@functools.cache  # one function for each, as `jax.jit` looks for what it has traced by identity
def _unmarked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its operations free of the mark, which is for the outer call alone."""

    @functools.wraps(function)
    def unmarked(*arguments: Array, **settings: Any) -> Any:
        with set_xla_metadata(inlineable=None):
            return function(*arguments, **settings)

    return unmarked
