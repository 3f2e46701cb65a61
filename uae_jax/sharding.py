"""One mesh, and rules that say how each parameter lies on it.

Axes: `data` (batch only), `fsdp` (batch, and parameters cut to save memory), `tensor` (heads and hidden widths).
Placement is data: a table of (pattern, axes) pairs over parameter names. Models never see a mesh; they name the axes of
their activations (`nn.constrain`).
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uae_jax import trees
from uae_jax.settings import Settings, setting

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
WIDEST = "widest"
Rule = tuple[str, tuple[str | None, ...] | str]

# (pattern of the whole name, mesh axes of the LAST axes of the leaf), so that stacked layers need no rule of their own;
# the first match counts. An axis that does not divide its dimension goes to the widest one that it does divide, and
# `WIDEST` asks for that at once. Optimizer slots, adapters, copies and averages end in the name of their parameter.
RULES: tuple[Rule, ...] = (
    (r"(.*/)?(scale|bias)", ()),
    # the table is cropped along its positions, so these stay whole
    (r"(.*/)?pos_embed/table", (None, "fsdp")),
    (r"(.*/)?embedding/table", ("tensor", "fsdp")),
    # Megatron's placement (arXiv 1909.08053): the first matrix of a pair is cut along its output, the second along its
    # input
    (r"(.*/)?((context_)?(query|key|value)|gate|up|fc1|first|linear|linear_1)/(kernel|b)", ("fsdp", "tensor")),
    (r"(.*/)?((context_)?output|out|down|fc2|second|linear_2)/(kernel|a)", ("tensor", "fsdp")),
    (r".*", WIDEST),
)
# below this many numbers a gather costs more than the memory it saves
SMALL = 2**16
# above this many numbers (16 MiB in float32) a copy on every device is a mistake
LARGE = 2**22


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Sizes of the mesh axes; one may be -1 and takes the devices that are left."""

    data: int = setting(-1, "devices over which a batch alone is sharded; -1 for those that are left", low=-1)
    fsdp: int = setting(1, "devices over which batch and parameters are sharded; -1 for those that are left", low=-1)
    tensor: int = setting(1, "devices over which matrices are sharded; -1 for those that are left", low=-1)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, an axis of 0, and two axes that are left open."""
        yield from super().problems()
        sizes = dataclasses.astuple(self)
        if 0 in sizes or sizes.count(-1) > 1:
            yield f"data, fsdp, tensor are {sizes}; each must be positive, and at most one may be -1"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, those of a process side by side, so that each process holds neighbouring rows of a
    batch.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(devices) % known:
        raise ValueError(f"mesh {dict(zip(AXES, sizes))} does not divide {len(devices)} devices; change config.mesh")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices, there are {len(devices)}; change "
            "config.mesh"
        )
    ordered = sorted(
        devices, key=lambda device: (getattr(device, "slice_index", 0) or 0, device.process_index, device.id)
    )
    return Mesh(np.asarray(ordered).reshape(sizes), AXES)


def in_use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """While the block runs, functions that are compiled place their activations on this mesh (`nn.constrain`)."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def matching_rule(name: str, rules: Sequence[Rule] = RULES) -> Rule:
    """The first rule whose pattern is the whole name.

    Raises:
      ValueError: there is none.
    """
    for rule in rules:
        if re.fullmatch(rule[0], name):
            return rule
    raise ValueError(f"no sharding rule matches the parameter {name!r}; add one to the table")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """Where one parameter lies: copied when it is small, else by its rule.

    Args:
      name: leaf name, such as `language/layers/attention/query/kernel`; optimizer slots and averages carry the same
        ending.
      shape: its shape; stacked layers have a leading layer axis.
      mesh: sizes of the axes.
      rules: the table.
    """
    _, wanted = matching_rule(name, rules)
    if wanted == () or int(np.prod(shape, dtype=np.int64)) < SMALL:
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)

    def place(axis: str, index: int | None) -> None:
        size = mesh.shape[axis]
        if size == 1:
            return
        free = [at for at in range(len(shape)) if spec[at] is None and shape[at] % size == 0]
        if index in free:
            spec[index] = axis
        elif axis == "fsdp" and free:
            spec[max(free, key=lambda at: shape[at])] = axis

    named = {} if wanted == WIDEST else {axis: len(shape) - len(wanted) + at for at, axis in enumerate(wanted) if axis}
    place("tensor", named.get("tensor"))
    place("fsdp", named.get("fsdp"))
    return PartitionSpec(*spec)


def check_rules(tree: trees.Tree, mesh: Mesh, rules: Sequence[Rule] = RULES) -> None:
    """Checks the table against a whole model.

    Args:
      tree: all parts of the model, arrays or shapes.
      mesh: sizes of the axes.
      rules: the table.

    Raises:
      ValueError: a rule that is never the first match, a leaf without a rule, or a leaf of more than `LARGE` numbers
        that every device would hold whole although parameters are to be cut (`fsdp` or `tensor` above 1).
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}
    used = {matching_rule(name, rules)[0] for name in shapes}
    for pattern, _ in rules:
        if pattern not in used:
            raise ValueError(
                f"the sharding rule {pattern!r} matches nothing in the model; correct its pattern or remove it"
            )
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    if fsdp * tensor == 1:
        return
    for name, shape in shapes.items():
        numbers = int(np.prod(shape, dtype=np.int64))
        if numbers > LARGE and not any(parameter_spec(name, shape, mesh, rules)):
            raise ValueError(
                f"{name} of shape {shape} ({numbers / 1e6:.0f} M numbers) would be copied to every device: none of "
                "its axes divides by "
                f"fsdp = {fsdp}, and its rule names none for tensor = {tensor}; set config.mesh.fsdp to a divisor of "
                "one of its axes"
            )


def tree_shardings(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """A `NamedSharding` for each leaf of parameters, adapters, optimizer state or averages."""
    return trees.map_with_name(
        lambda name, leaf: NamedSharding(mesh, parameter_spec(name, tuple(leaf.shape), mesh)), tree
    )


def gather_over_fsdp(tree: trees.Tree, dtype: Any) -> trees.Tree:
    """Inside a compiled function: matrices in the precision they are used in, cut over `tensor` alone.

    A loop that reads its weights in every pass, such as the sampling of captions, then gathers them once, for the
    memory of one copy. Without a mesh in use (`in_use`) nothing happens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def whole(name: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        spec = [axis if axis == "tensor" else None for axis in parameter_spec(name, leaf.shape, mesh)]
        return jax.lax.with_sharding_constraint(leaf.astype(dtype), PartitionSpec(*spec))

    return trees.map_with_name(whole, tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A leaf on the mesh. Every process holds the whole value of a leaf that is not on a mesh of several processes
    yet.
    """
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def shard_tree(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Puts every leaf where its rule says; with several processes all of them call this with the same values."""
    return jax.tree.map(_put, tree, tree_shardings(tree, mesh))


def make_on(mesh: Mesh, function: Callable[..., trees.Tree], *arguments: Any) -> trees.Tree:
    """`function(*arguments)`, a tree, computed where its rules say, so that no device ever holds a cut leaf whole."""
    return jax.jit(function, out_shardings=tree_shardings(jax.eval_shape(function, *arguments), mesh))(*arguments)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A typed random key on every device of every process."""
    data = _put(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def host_values(tree: trees.Tree) -> trees.Tree:
    """The whole leaves as numpy arrays, on every process; all processes call this together."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def batch_slice(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which rows of the global batch a process feeds: the i-th of n equal slices, as (i, n).

    Processes that share their rows, because the tensor axis spans them, get the same slice.

    Args:
      mesh: over `data` and `fsdp`, which cut the batch.
      process: its index; None for this one.

    Raises:
      ValueError: the devices of a process hold rows that are no such slice.
    """
    process = jax.process_index() if process is None else process
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    shards = np.flatnonzero((owners.reshape(ways, -1) == process).any(1))
    first, size = int(shards[0]), len(shards)
    if shards[-1] - first + 1 != size or first % size or ways % size:
        raise ValueError(
            f"the devices of process {process} hold the parts {shards.tolist()} of a batch cut into {ways}; choose "
            "config.mesh.tensor "
            f"so that it divides, or is a multiple of, the devices of a process"
        )
    return first // size, ways // size


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch (numpy leaves, rows of `batch_slice`) on the mesh, over `data` and `fsdp`.

    Raises:
      ValueError: the batch does not divide over the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    ways, (_, count) = mesh.shape["data"] * mesh.shape["fsdp"], batch_slice(mesh)

    def put(leaf: np.ndarray) -> jax.Array:
        rows = leaf.shape[0] * count
        if rows % ways:
            raise ValueError(f"a batch of {rows} does not divide over {ways} devices; change batch_size or config.mesh")
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), (rows, *leaf.shape[1:]))

    return jax.tree.map(put, batch)
