"""Which devices a computation is for, and how their compilers are told what they would not see."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AbstractMesh


def current_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` or `jax.sharding.use_abstract_mesh` made current."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the devices of the current mesh, else the default ones."""
    device = getattr(current_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether the computation is on a single CPU device, so that axes of a batch may be merged with others."""
    mesh = current_mesh()
    return platform() == "cpu" and (jax.device_count() if mesh is None else mesh.size) == 1


def apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled by itself on a single CPU: nothing inside is fused with anything outside.

    The CPU backend drops `optimization_barrier` before it fuses (jax 0.10.2); a call that may not be inlined stays one. On other devices
    the function as it is.
    """
    if not on_one_cpu():
        return function

    def call(*arguments: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(function)(*arguments)

    return call


def settle(x: Array) -> Array:
    """The same array, on a single CPU written before anything reads it: a fusion would compute it anew for every reader's element."""
    return apart(_same)(x)


def _same(x: Array) -> Array:
    return x
