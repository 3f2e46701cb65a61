"""One mesh, and rules for the sharding of each parameter.

Axes: `data` (batch only), `fsdp` (batch, and parameters sharded to save memory), `tensor` (heads and hidden widths).
The rules are a table of (pattern, axes) pairs over parameter names. Models never see a mesh; they name the axes of
their activations (`nn.constrain`).
"""

import contextlib
import dataclasses
import functools
import gc
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from uae_jax import trees
from uae_jax.settings import Settings, setting

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
WIDEST = "widest"
EIGHT_BITS = r"\w+_scales/.*"  # of kernels of 8 bits, a number for each output
Cut = str | tuple[str, ...] | None  # the mesh axis of one axis, or several, the outermost first
Rule = tuple[str, tuple[Cut, ...] | str]

POSITIONS = r"(.*/)?pos_embed/table"
# (pattern of the complete name, mesh axes of the LAST axes of the leaf), so that stacked layers need no separate rules.
# The first match counts. An fsdp axis that does not divide its dimension moves to the widest dimension that it divides;
# `WIDEST` chooses that dimension at once. Optimizer slots, adapters, copies and averages end in the parameter's name.
# fsdp cuts the rows of a matrix. Cut over 64 devices, columns are 24 or 32 wide, in registers of 128 lanes: libtpu
# gathers them by a sum of parts padded with zeros, twice the bytes, and copies the result into whole registers.
RULES: tuple[Rule, ...] = (
    (r"(.*/)?(scale|bias)", ()),
    (EIGHT_BITS, ()),
    # the table is cropped along its positions, so the positions are not sharded
    (POSITIONS, (None, "fsdp")),
    (r"(.*/)?embedding/table", ("tensor", "fsdp")),
    # Megatron's sharding (arXiv 1909.08053): the first matrix of a pair along its output, the second along its input
    (r"(.*/)?((context_)?(query|key|value)|gate|up|fc1|first|linear|linear_1)/(kernel|b)", ("fsdp", "tensor")),
    (r"(.*/)?((context_)?output|out|down|fc2|second|linear_2)/(kernel|a)", (("tensor", "fsdp"), None)),
    (r".*", WIDEST),
)
# of SD3 alone, and of decoders in 8 bits
OPTIONAL = (POSITIONS, EIGHT_BITS)
# for fewer numbers a gather costs more than the memory that sharding saves
SMALL = 2**16
# for more numbers (16 MiB in float32) a copy on every device is a mistake
LARGE = 2**22


class Sizes(Protocol):
    """The sizes of a mesh, without devices."""

    @property
    def shape(self) -> Mapping[str, int]: ...


Axes = Mesh | AbstractMesh | Sizes


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Sizes of the mesh axes; one may be -1 and gets the remaining devices."""

    data: int = setting(-1, "devices over which a batch alone is sharded; -1 for the remaining devices", low=-1)
    fsdp: int = setting(1, "devices over which batch and parameters are sharded; -1 for the remaining devices", low=-1)
    tensor: int = setting(1, "devices over which matrices are sharded; -1 for the remaining devices", low=-1)

    def problems(self) -> Iterator[str]:
        """The mistakes of ranges, an axis of 0, and two axes of -1."""
        yield from super().problems()
        sizes = dataclasses.astuple(self)
        if 0 in sizes or sizes.count(-1) > 1:
            yield f"data, fsdp, tensor are {sizes}; each must be positive, and at most one may be -1"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, whose axes follow the links between them.

    TPUs lie as `jax.experimental.mesh_utils` places them: neighbours of an axis are neighbours in their slice. Several
    slices divide `data`, and `fsdp` where `data` is too small. Cards and simulated devices lie in the order of their
    processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or do not divide over the slices.
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
    return Mesh(_placed(sizes, devices), AXES)


def _placed(sizes: list[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the form of the mesh."""

    def slice_of(device: Any) -> int:
        return getattr(device, "slice_index", 0) or 0

    ordered = sorted(devices, key=lambda device: (slice_of(device), device.process_index, device.id))
    slices = len({slice_of(device) for device in ordered})
    if ordered[0].platform != "tpu" or not _is_box(ordered, slices):
        return np.asarray(ordered).reshape(sizes)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, ordered, allow_split_physical_axes=True)
    outer = slices_of(sizes[0], sizes[1], slices)
    if outer is None:
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes))} does not divide over {slices} slices; make config.mesh.data a multiple of "
            f"{slices}"
        )
    inner = [size // parts for size, parts in zip(sizes, (*outer, 1))]
    return mesh_utils.create_hybrid_device_mesh(inner, (*outer, 1), ordered, allow_split_physical_axes=True)


def slices_of(data: int, fsdp: int, slices: int) -> tuple[int, int] | None:
    """Over how many slices the axes `data` and `fsdp` go, `data` first; None where they cannot be divided so."""
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    # an axis inside of slices has no axis over slices behind it, so that each slice has consecutive rows
    possible = fsdp % over_fsdp == 0 and (over_fsdp == 1 or over_data == data)
    return (over_data, over_fsdp) if possible else None


def _is_box(devices: Sequence[Any], slices: int) -> bool:
    """Whether TPUs fill a box of each slice's grid, which a part of a slice may not."""
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return int(np.prod(places.max(0) - places.min(0) + 1)) * slices == len(devices)


def in_use(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Functions compiled inside the block shard their activations over this mesh (`nn.constrain`)."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def matching_rule(name: str, rules: Sequence[Rule] = RULES) -> Rule:
    """The first rule whose pattern matches the complete name.

    Raises:
      ValueError: no rule matches.
    """
    for rule in rules:
        if re.fullmatch(rule[0], name):
            return rule
    raise ValueError(f"no sharding rule matches the parameter {name!r}; add one to the table")


def parameter_spec(name: str, shape: tuple[int, ...], mesh: Axes, rules: Sequence[Rule] = RULES) -> PartitionSpec:
    """The sharding of one parameter: replicated if small, else by its rule.

    Args:
      name: leaf name, such as `language/layers/attention/query/kernel`; optimizer slots and averages have the same
        ending.
      shape: of the leaf; stacked layers have a leading layer axis.
      mesh: sizes of the axes.
      rules: the table.
    """
    _, wanted = matching_rule(name, rules)
    if wanted == () or int(np.prod(shape, dtype=np.int64)) < SMALL:
        return PartitionSpec()
    spec: list[Cut] = [None] * len(shape)

    def shard(axis: str, index: int | None) -> None:
        size = mesh.shape[axis]
        if size == 1:
            return
        free = [at for at in range(len(shape)) if spec[at] is None and shape[at] % size == 0]
        if index is not None and index in free:
            spec[index] = axis
        elif index is not None and spec[index] == "tensor" and shape[index] % (size * mesh.shape["tensor"]) == 0:
            spec[index] = ("tensor", axis)
        elif axis == "fsdp" and free:
            spec[max(free, key=lambda at: shape[at])] = axis

    named = {
        axis: len(shape) - len(wanted) + at
        for at, axes in enumerate(() if wanted == WIDEST else wanted)
        for axis in axes_of(axes)
    }
    shard("tensor", named.get("tensor"))
    shard("fsdp", named.get("fsdp"))
    return PartitionSpec(*spec)


def axes_of(cut: Cut) -> tuple[str, ...]:
    """The mesh axes of one entry of a rule or of a `PartitionSpec`."""
    if cut is None:
        return ()
    return (cut,) if isinstance(cut, str) else cut


def check_rules(tree: trees.Tree, mesh: Axes, rules: Sequence[Rule] = RULES) -> None:
    """Checks the table against a complete model.

    Args:
      tree: all parts of the model, arrays or shapes.
      mesh: sizes of the axes.
      rules: the table.

    Raises:
      ValueError: a rule that is never the first match, a leaf without a rule, or a replicated leaf of more than `LARGE`
        numbers although parameters are sharded (`fsdp` or `tensor` above 1).
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in trees.flatten(tree).items()}
    used = {matching_rule(name, rules)[0] for name in shapes}
    for pattern, _ in rules:
        if pattern not in used and pattern not in OPTIONAL:
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
                f"its axes divides by fsdp = {fsdp}, and its rule names none for tensor = {tensor}; set "
                "config.mesh.fsdp to a divisor of one of its axes"
            )


def tree_shardings(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """A `NamedSharding` for each leaf of parameters, adapters, optimizer state or averages."""
    return trees.map_with_name(
        lambda name, leaf: NamedSharding(mesh, parameter_spec(name, tuple(leaf.shape), mesh)), tree
    )


def gather_over_fsdp(tree: trees.Tree, dtype: Any = None) -> trees.Tree:
    """Inside a compiled function: matrices in the precision of their use, or in their own for None, sharded over
    `tensor` alone; 8 bits stay.

    A loop that reads its weights in every pass, such as caption sampling, then gathers the weights once, for the memory
    of one copy. Without a mesh in use (`in_use`) the tree is unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree

    def whole(name: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return leaf
        spec = ["tensor" if "tensor" in axes_of(cut) else None for cut in parameter_spec(name, leaf.shape, mesh)]
        read = leaf if dtype is None or leaf.dtype == np.int8 else leaf.astype(dtype)
        return jax.lax.with_sharding_constraint(read, PartitionSpec(*spec))

    return trees.map_with_name(whole, tree)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts a leaf on the mesh. Every process has the complete value of a leaf that is not on a global mesh yet."""
    if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def shard_tree(tree: trees.Tree, mesh: Mesh) -> trees.Tree:
    """Shards every leaf by its rule; several processes all call this with the same values."""
    return jax.tree.map(_put, tree, tree_shardings(tree, mesh))


def make_on(mesh: Mesh, function: Callable[..., trees.Tree], *arguments: Any) -> trees.Tree:
    """The tree `function(*arguments)`, computed in shards, so that no device ever has a complete sharded leaf."""
    return jax.jit(function, out_shardings=tree_shardings(jax.eval_shape(function, *arguments), mesh))(*arguments)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """A typed random key on every device of every process."""
    data = _put(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def host_values(tree: trees.Tree) -> trees.Tree:
    """The complete leaves as numpy arrays, on every process; all processes call this together."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


_row = jax.jit(lambda leaf, row: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False))


@functools.cache
def _gather(mesh: Any, one: bool) -> Callable:
    """A compiled function that gives every device a whole leaf, or one row of it."""
    return jax.jit(_row if one else lambda leaf, row: leaf, out_shardings=replicated(mesh))


def first_process_value(leaf: Any, row: int | None = None) -> np.ndarray | None:
    """One leaf, or one row of its first axis, on the host of process 0; None in the others. All call it together.

    Neither host nor devices keep a copy: jax would keep one of `np.asarray(leaf)` as long as the leaf lives.
    """
    if not isinstance(leaf, jax.Array):
        return (np.asarray(leaf) if row is None else np.asarray(leaf[row])) if jax.process_index() == 0 else None
    gc.collect(0)  # from jaxlib 0.12 on a host copy of an array that is gone stays until a collection
    placed = leaf.sharding
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated) and isinstance(placed, NamedSharding):
        gathered = _gather(placed.mesh, row is not None)(leaf, row or 0)
        jax.block_until_ready(gathered)  # a process that writes nothing would ask for all leaves at once
        return np.asarray(gathered.addressable_data(0)) if jax.process_index() == 0 else None
    if jax.process_index():
        return None
    if leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)
    devices = leaf.devices()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":  # the host's own memory
        return np.asarray(leaf if row is None else np.asarray(leaf)[row])
    if row is not None:
        return np.asarray(_row(leaf, row))
    shards = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards))


def batch_slice(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """The part of the global batch that a process loads: the i-th of n parts of one size, as (i, n).

    Processes that hold the same rows, because the tensor axis spans them, get the same part. A part's rows are placed
    on the process's devices. On TPUs these need not be neighbours, so that rows may lie in another order than loaded.

    Args:
      mesh: its axes `data` and `fsdp` shard the batch.
      process: index of the process; None for this process.

    Raises:
      ValueError: processes share some of their rows, or hold different numbers of them.
    """
    process = jax.process_index() if process is None else process
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    rows = owners.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held = {int(owner): frozenset(np.flatnonzero((rows == owner).any(1)).tolist()) for owner in np.unique(rows)}
    parts = sorted(set(held.values()), key=min)
    if len({len(part) for part in parts}) > 1 or sum(len(part) for part in parts) != len(rows):
        raise ValueError(
            f"the devices of process {process} hold the shards {sorted(held[process])} of {len(rows)} of a batch, and "
            "other processes some of them; choose config.mesh.tensor so that it divides, or is a multiple of, the "
            "devices of a process"
        )
    return parts.index(held[process]), len(parts)


def shard_rows(rows: Any, mesh: Mesh) -> Any:
    """Puts a batch that every process has whole (numpy leaves `[B, ...]`) on the mesh in its order, over `data` and
    `fsdp`.
    """
    placed = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, placed, lambda at: leaf[at]), rows)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's rows of a batch (numpy leaves, part of `batch_slice`) on the mesh, over `data` and `fsdp`.

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


def local_rows(leaf: jax.Array) -> np.ndarray:
    """This process's rows of an array on the mesh, the first axis over `data` and `fsdp` as in `shard_batch`."""
    shards = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
    return np.concatenate([np.asarray(shards[at]) for at in sorted(shards)])
