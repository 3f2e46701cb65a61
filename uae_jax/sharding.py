"""One mesh, and rules that say how each parameter lies on it.

Axes: `data` (batch only), `fsdp` (batch, and parameters cut along their largest axis), `tensor` (heads and hidden widths).
Shardings are data: a list of (pattern, spec) pairs over parameter names. Models never see a mesh.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import trees

AXES = ("data", "fsdp", "tensor")

# Megatron's placement (arXiv 1909.08053): the first matrix of a pair is cut along its output, the second along its input
COLUMN = r".*/(query|key|value|gate|up|fc1|context_query|context_key|context_value)/kernel"
ROW = r".*/(output|down|fc2|context_output)/kernel"
# below this size a gather costs more than the memory it saves
SMALL = 2**16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of all devices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh sizes are {dict(zip(AXES, sizes))}; each must be positive, and at most one may be -1")
    if len(devices) % known:
        raise ValueError(f"mesh {dict(zip(AXES, sizes))} does not divide {len(devices)} devices; change config.mesh")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices, there are {len(devices)}; change config.mesh")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where one parameter lies: tensor axis by its role, fsdp along the largest axis that is left and divides.

    Args:
      name: leaf name, such as `language/layers/attention/query/kernel`; optimizer slots and averages carry the same ending.
      shape: its shape; stacked layers have a leading layer axis.
      mesh: sizes of the axes.
    """
    spec: list[str | None] = [None] * len(shape)
    if int(np.prod(shape, dtype=np.int64)) < SMALL:
        return PartitionSpec()
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    axis = -1 if re.fullmatch(COLUMN, name) else -2 if re.fullmatch(ROW, name) else None
    if axis is not None and tensor > 1 and shape[axis] % tensor == 0:
        spec[axis] = "tensor"
    if fsdp > 1:
        free = [index for index in range(len(shape)) if spec[index] is None and shape[index] % fsdp == 0]
        if free:
            spec[max(free, key=lambda index: shape[index])] = "fsdp"
    return PartitionSpec(*spec)


def tree_shardings(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """A `NamedSharding` for each leaf of parameters, adapters, optimizer state or averages."""
    return trees.map_with_name(lambda name, leaf: NamedSharding(mesh, parameter_spec(name, tuple(leaf.shape), mesh)), tree)


def shard_tree(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Puts every leaf where its rule says."""
    return jax.device_put(tree, tree_shardings(tree, mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch (`[B / processes, ...]` numpy leaves) on the mesh, over `data` and `fsdp`.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(leaf: np.ndarray) -> jax.Array:
        if leaf.shape[0] * jax.process_count() % ways:
            raise ValueError(f"a batch of {leaf.shape[0] * jax.process_count()} does not divide over {ways} devices; change batch_size or config.mesh")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, batch)
