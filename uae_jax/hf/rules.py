"""Tables that map published tensors to our parameters, and the loader that checks names and shapes both ways."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from uae_jax import trees
from uae_jax.files.paths import is_url
from uae_jax.hf.finite import count_non_finite
from uae_jax.hf.safetensors import DTYPES, Tensors

# from a tree of shapes to a tree of shardings
Placement = Callable[[trees.Tree], trees.Tree]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters and its source: one published tensor, or one tensor for each layer.

    Attributes:
      ours: leaf name, such as `layers/attention/query/kernel`.
      theirs: published name; `{}` stands for the layer number when `layers` is given.
      layout: `same`; `dense` (torch `[out, in]` to `[in, out]`); `conv` (`OIHW` to `HWIO`); `patch` (`[O, ...]`
        flattened and transposed to `[prod(...), O]`, a convolution whose stride is its window); `last_frame` (the last
        time slice of `OITHW` to `HWIO`; the others are zero when it is written back).
      layers: layer numbers stacked along our first axis, or None for one tensor.
      torch_shape: the published shape, needed to write back shapes that our layout flattens, as `patch` does.
    """

    ours: str
    theirs: str
    layout: str = "same"
    layers: tuple[int, ...] | None = None
    torch_shape: tuple[int, ...] | None = None

    def sources(self) -> list[str]:
        """Published names in stacking order."""
        return [self.theirs] if self.layers is None else [self.theirs.format(layer) for layer in self.layers]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A published tensor in our layout (one layer)."""
        if self.layout == "dense":
            return tensor.T
        if self.layout == "conv":
            return tensor.transpose(2, 3, 1, 0)
        if self.layout == "patch":
            return tensor.reshape(tensor.shape[0], -1).T
        if self.layout == "last_frame":
            return tensor[:, :, -1].transpose(2, 3, 1, 0)
        return tensor

    def our_shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a published tensor in our layout (one layer), or None for another number of dimensions."""
        try:
            return self.to_ours(_blank(stored)).shape
        except (ValueError, IndexError):
            return None

    def to_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.layout == "dense":
            return tensor.T
        if self.layout == "conv":
            return tensor.transpose(3, 2, 0, 1)
        if self.layout == "patch":
            return tensor.T.reshape(self.torch_shape)
        if self.layout == "last_frame" and self.torch_shape is not None:
            whole = np.zeros(self.torch_shape, tensor.dtype)
            whole[:, :, -1] = tensor.transpose(3, 2, 0, 1)
            return whole
        return tensor


def canonical(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """The name after all pairs (regular expression, replacement), applied in turn."""
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def load_params(
    folder: Tensors,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
    dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
    placement: Placement | None = None,
) -> dict[str, Any]:
    """Reads every parameter of a model, after checking that names and shapes agree both ways.

    Parameters are read one after the other; of each, a process reads only what its devices hold. With a placement, host
    memory holds at most one shard of a parameter and the pages of one of its tensors.

    Args:
      folder: the tensors.
      rules: one for each leaf of `abstract`.
      abstract: the model's parameters as shapes (`jax.eval_shape` of its initialisation).
      aliases: pairs (regular expression, replacement) that turn other published names into those of the rules.
      ignore: regular expression of published names that are not parameters (buffers, tied copies, other parts).
      dtype: precision to cast floating tensors to, or a precision by the first word of the leaf name; None keeps the
        stored precision.
      placement: function from the tree of shapes to a tree of shardings; None leaves the parameters on the host.

    Returns:
      Nested dictionaries with the structure of `abstract`, of jax arrays sharded by `placement`, or of numpy arrays.

    Raises:
      ValueError: a tensor is missing, unknown, duplicated, of another shape, or holds non-finite numbers; the message
        has its name and file.
    """
    wanted, published = _checked_names(folder, rules, abstract, aliases, ignore)
    shardings = None if placement is None else trees.flatten(placement(abstract))
    leaves = {}
    folder.expect([published[source] for rule in rules for source in rule.sources()])
    for rule in rules:
        own = dtype.get(rule.ours.partition("/")[0]) if isinstance(dtype, Mapping) else dtype
        sources = [published[source] for source in rule.sources()]
        stored = _Stored(folder, rule, sources, tuple(wanted[rule.ours].shape), own)
        leaves[rule.ours] = stored.read() if shardings is None else stored.place(shardings[rule.ours])
    return trees.unflatten(leaves)


def check_params(
    folder: Tensors,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
) -> None:
    """The checks of `load_params` (names, shapes, finite numbers) without keeping the weights.

    Tensors are read one at a time; the arguments are those of `load_params`.

    Raises:
      ValueError: a tensor is missing, unknown, duplicated, of another shape, or holds non-finite numbers; the message
        has its name.
    """
    _, published = _checked_names(folder, rules, abstract, aliases, ignore)
    folder.expect(sorted(published.values()))
    for name in sorted(published.values()):
        if count_non_finite(folder.read(name)):
            raise ValueError(f"{folder.file(name)}: {name} holds NaN or infinity; copy the file again")


def _checked_names(
    folder: Tensors, rules: Sequence[Rule], abstract: trees.Tree, aliases: Sequence[tuple[str, str]], ignore: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The leaves of `abstract` by name, and the names in the folder by canonical name, after all checks."""
    wanted, names = trees.flatten(abstract), [rule.ours for rule in rules]
    wrong = set(names) ^ set(wanted)
    if wrong or len(names) != len(set(names)):
        raise ValueError(f"rule table and model disagree on the parameters {sorted(wrong)}")
    published = _canonical_names(folder, aliases, ignore)
    _check_names(folder, rules, published)
    _check_shapes(folder, rules, published, wanted)
    return wanted, published


def _canonical_names(folder: Tensors, aliases: Sequence[tuple[str, str]], ignore: str) -> dict[str, str]:
    published: dict[str, str] = {}
    for name in folder.names():
        known = canonical(name, aliases)
        if ignore and re.fullmatch(ignore, known):
            continue
        if known in published:
            both = " and ".join(sorted((name, published[known])))
            raise ValueError(f"weights in {folder.path} hold one tensor under two names, {both}; keep the right one")
        published[known] = name
    return published


def _check_names(folder: Tensors, rules: Sequence[Rule], published: dict[str, str]) -> None:
    expected = {source for rule in rules for source in rule.sources()}
    missing = sorted(expected - set(published))
    unknown = sorted(published[name] for name in set(published) - expected)
    if not (missing or unknown):
        return
    parts = [f"missing: {listed(missing)}"] if missing else []
    if unknown:
        others = " and other files" if len({folder.file(name) for name in unknown}) > 1 else ""
        parts.append(f"unknown: {listed(unknown)} in {folder.file(unknown[0])}{others}")
    remedy = "Check that the folder holds this model and that its config.json belongs to it"
    # many wrong names mean a file of another model, few may mean a renamed tensor
    few = missing and len(missing) + len(unknown) <= 16
    if near := difflib.get_close_matches(missing[0], unknown, 1, 0.8) if few else []:
        remedy = (
            f"If {near[0]} is {missing[0]}, give it that name; if not, check that folder and config.json are of this "
            "model"
        )
    raise ValueError(f"weights in {folder.path} do not fit the model; {'; '.join(parts)}. {remedy}")


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names for a message: the first `most` in alphabetical order, and the count of the rest."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_shapes(folder: Tensors, rules: Sequence[Rule], published: dict[str, str], wanted: dict[str, Any]) -> None:
    wrong = []
    for rule in rules:
        target = tuple(wanted[rule.ours].shape)
        target = target if rule.layers is None else target[1:]
        for source in rule.sources():
            stored = folder.shape(published[source])
            if rule.our_shape(stored) != target:
                needed = rule.torch_shape or rule.to_theirs(_blank(target)).shape
                wrong.append(
                    f"{published[source]} in {folder.file(published[source])} is {list(stored)}, the model needs "
                    f"{list(needed)}"
                )
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"shapes in {folder.path} do not fit its config.json: {wrong[0]}{more}. Copy config.json and weights of "
            "one model there"
        )


def _blank(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.int8), shape)


def local_shards(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], list[Any]]]:
    """The different shards of this process, each with the devices that hold it."""
    found: dict[tuple, tuple[tuple[slice, ...], list[Any]]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = index or ()  # of a scalar
        key = tuple(part.indices(size) for part, size in zip(index, shape))
        found.setdefault(key, (index, []))[1].append(device)
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One of our parameters in its folder.

    Attributes:
      folder: the tensors.
      rule: the layout.
      sources: names of the parameter's tensors in the folder, in stacking order.
      shape: ours.
      dtype: wanted precision, or None for the stored one.
    """

    folder: Tensors
    rule: Rule
    sources: list[str]
    shape: tuple[int, ...]
    dtype: DTypeLike | None

    def place(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """The parameter on its devices; a shard of several devices is read once, and gone before the next is read."""
        dtype, placed = self._dtype(), []
        shards = local_shards(sharding, self.shape)
        indices = [index for index, _ in shards]
        # a tensor of a bucket is read once, so that all shards take their parts of it at one time
        remote = is_url(self.folder.path)
        blocks = self._blocks(indices, dtype) if remote else (self._block(index, dtype) for index in indices)
        for block, (_, devices) in zip(blocks, shards):
            # the host's copy has to stay until the devices have theirs
            placed += jax.block_until_ready([jax.device_put(block, device) for device in devices])
        return jax.make_array_from_single_device_arrays(self.shape, sharding, placed)

    def read(self) -> np.ndarray:
        """The complete parameter on the host."""
        return self._block((slice(None),) * len(self.shape), self._dtype())

    def _dtype(self) -> np.dtype:
        known = {source: self._stored_dtype(source) for source in self.sources}
        stored = set(known.values())
        for dtype in stored:
            if not jnp.issubdtype(dtype, np.floating):
                source = next(name for name in self.sources if known[name] == dtype)
                raise ValueError(
                    f"{self.folder.file(source)} stores {source} as {dtype}, so the model is quantised; give weights "
                    "in float32, float16 or bfloat16"
                )
        return np.dtype(functools.reduce(jnp.promote_types, stored)) if self.dtype is None else np.dtype(self.dtype)

    def _stored_dtype(self, source: str) -> np.dtype:
        name = self.folder.dtype(source)
        return np.dtype(DTYPES[name]) if name in DTYPES else self.folder.read(source).dtype

    def _block(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        return self._blocks([index], dtype)[0]

    def _blocks(self, indices: Sequence[tuple[slice, ...]], dtype: np.dtype) -> list[np.ndarray]:
        """Parts of the parameter; each of its tensors is read once for all of them."""
        blocks = [
            np.empty([len(range(*part.indices(size))) for part, size in zip(index, self.shape)], dtype)
            for index in indices
        ]
        if self.rule.layers is None:
            self._fill([*zip(blocks, indices)], self.sources[0])
            return blocks
        rows = [range(*index[0].indices(self.shape[0])) for index in indices]
        for layer, source in enumerate(self.sources):
            wanted = [
                (block[held.index(layer), ...], index[1:])
                for block, index, held in zip(blocks, indices, rows)
                if layer in held
            ]
            if wanted:
                self._fill(wanted, source)
        return blocks

    def _fill(self, wanted: Sequence[tuple[np.ndarray, tuple[slice, ...]]], source: str) -> None:
        """Copies parts of one tensor to their blocks, in our layout and precision."""
        whole = self.rule.to_ours(self.folder.read(source))
        for block, index in wanted:
            _copy(whole[index], block)
            if count_non_finite(block):
                self._refuse(whole[index], block, source)

    def _refuse(self, tensor: np.ndarray, block: np.ndarray, source: str) -> NoReturn:
        if not count_non_finite(tensor):
            raise ValueError(
                f"{self.folder.file(source)}: {source} passes the range of {block.dtype}; read it as float32 or "
                "bfloat16"
            )
        raise ValueError(
            f"{self.folder.file(source)}: {source} holds NaN or infinity; copy the file again, or, if its source is "
            "the same, convert the weights again"
        )


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies and casts. A transposed source is copied in strips of one cache line of the target, which is several times
    faster.
    """
    if source.ndim < 2 or source.strides[-1] <= min(source.strides) or source.size < 2**14:
        target[...] = source
        return
    strip = max(1, 64 // target.itemsize)
    for start in range(0, source.shape[-1], strip):
        target[..., start : start + strip] = source[..., start : start + strip]


def published_tensors(
    params: trees.Tree, rules: Sequence[Rule], dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The published names and arrays of a model's parameters; the inverse of `load_params`.

    Args:
      params: nested dictionaries of arrays.
      rules: the model's table.
      dtype: precision to cast to; None keeps the parameters' precision.
    """
    leaves = trees.flatten(params)
    for rule in rules:
        leaf = np.asarray(leaves[rule.ours])
        leaf = leaf if dtype is None else leaf.astype(dtype)
        layers = [leaf] if rule.layers is None else list(leaf)
        for source, tensor in zip(rule.sources(), layers):
            yield source, rule.to_theirs(tensor)
