"""How activations are sharded: models name the axes, and the current mesh decides what a name means.

Without a current mesh (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), and inside a `shard_map`, nothing happens.
"""

import math
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from uae_jax.nn.device import current_mesh

Tree = TypeVar("Tree")
# name of an activation's axis -> mesh axes that shard it
LOGICAL = {"batch": ("data", "fsdp"), "heads": ("tensor",), "hidden": ("tensor",), "vocab": ("tensor",)}


def ways(name: str) -> int:
    """The number of shards of an activation's axis, a key of `LOGICAL`; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in LOGICAL[name])


def constrain(x: Array, *names: str | None) -> Array:
    """Fixes the sharding of an activation.

    Args:
      x: any array inside a compiled function.
      names: one for each leading axis: a key of `LOGICAL`, or None for an axis that is not sharded. Axes without a name
        are not sharded either. The compiler decides about an axis that its mesh axes do not divide.

    Returns:
      The same values.

    Raises:
      KeyError: a name that is not in `LOGICAL`.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return x

    def axes_of(size: int, name: str | None) -> object:
        if name is None:
            return None
        axes = tuple(axis for axis in LOGICAL[name] if mesh.shape.get(axis, 1) > 1)
        return PartitionSpec.UNCONSTRAINED if size % ways(name) else axes or None

    return lax.with_sharding_constraint(x, PartitionSpec(*(axes_of(size, name) for size, name in zip(x.shape, names))))


def constrain_rows(tree: Tree) -> Tree:
    """`constrain(leaf, "batch")` for every leaf `[B, ...]` of a tree."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch"), tree)
