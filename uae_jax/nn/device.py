"""Which devices a computation is for."""

import jax
from jax.sharding import AbstractMesh


def current_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` or `jax.sharding.use_abstract_mesh` made current; None without one."""
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
