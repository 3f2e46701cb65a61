"""Tables that say which published tensor is which parameter of ours, and the loader that checks them both ways."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import trees
from uae_jax.hf.finite import count_non_finite
from uae_jax.hf.safetensors import TensorFolder

# from a tree of shapes to a tree of shardings
Placement = Callable[[trees.Tree], trees.Tree]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter of ours and the published tensor, or one tensor a layer, that it comes from.

    Attributes:
      ours: name of the leaf, such as `layers/attention/query/kernel`.
      theirs: published name; `{}` stands for the layer number when `layers` is given.
      layout: `same`; `dense` (torch `[out, in]` to `[in, out]`); `conv` (`OIHW` to `HWIO`); `patch` (`[O, ...]`
        flattened and transposed to `[prod(...), O]`, a convolution whose stride is its window).
      layers: layer numbers stacked along our first axis, or None for one tensor.
      torch_shape: the published shape, needed to write `patch` tensors back and other shapes that ours flattens.
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
        return tensor


def canonical(name: str, aliases: Sequence[tuple[str, str]]) -> str:
    """The name after all (regular expression, replacement) pairs in turn."""
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def load_params(
    folder: TensorFolder,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
    dtype: np.dtype | Mapping[str, np.dtype] | None = None,
    placement: Placement | None = None,
) -> dict:
    """Reads every parameter of a model, after checking that names and shapes agree both ways.

    Parameters are read one after the other, and of each only what this process's devices hold: with a placement, host
    memory never holds more than one parameter and the pages of one of its tensors.

    Args:
      folder: where the tensors are.
      rules: one for each leaf of `abstract`.
      abstract: the model's parameters as shapes (`jax.eval_shape` of its initialisation).
      aliases: (regular expression, replacement) pairs that turn other published names into those of the rules.
      ignore: regular expression of published names that are not parameters (buffers, tied copies, other parts).
      dtype: precision to cast floating tensors to, or one by the first word of a leaf's name; None keeps what is
        stored.
      placement: where the parameters go: a function from the tree of shapes to a tree of shardings. None leaves them on
        the host.

    Returns:
      Nested dictionaries with the structure of `abstract`, of jax arrays laid out as `placement` says, or of numpy
      arrays.

    Raises:
      ValueError: a tensor is missing, unknown, there twice, of another shape, or not finite; it is named, with its
        file.
    """
    wanted = trees.flatten(abstract)
    _check_table(rules, wanted)
    published = _canonical_names(folder, aliases, ignore)
    _check_names(folder, rules, published)
    _check_shapes(folder, rules, published, wanted)
    shardings = None if placement is None else trees.flatten(placement(abstract))
    leaves = {}
    for rule in rules:
        own = dtype.get(rule.ours.partition("/")[0]) if isinstance(dtype, Mapping) else dtype
        stored = _Stored(
            folder, rule, [published[source] for source in rule.sources()], tuple(wanted[rule.ours].shape), own
        )
        leaves[rule.ours] = stored.read() if shardings is None else stored.place(shardings[rule.ours])
    return trees.unflatten(leaves)


def check_params(
    folder: TensorFolder,
    rules: Sequence[Rule],
    abstract: trees.Tree,
    *,
    aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "",
) -> None:
    """The checks of `load_params` for weights that others stand for: names, shapes, and that every number is finite.

    Tensors are read one at a time and dropped; the arguments are those of `load_params`.

    Raises:
      ValueError: a tensor is missing, unknown, there twice, of another shape, or not finite; it is named.
    """
    wanted = trees.flatten(abstract)
    _check_table(rules, wanted)
    published = _canonical_names(folder, aliases, ignore)
    _check_names(folder, rules, published)
    _check_shapes(folder, rules, published, wanted)
    for name in sorted(published.values()):
        if count_non_finite(folder.read(name)):
            raise ValueError(f"{folder.file(name)}: {name} holds NaN or infinity; copy the file again")


def _check_table(rules: Sequence[Rule], wanted: dict) -> None:
    names = [rule.ours for rule in rules]
    wrong = set(names) ^ set(wanted)
    if wrong or len(names) != len(set(names)):
        raise ValueError(f"rule table and model disagree on the parameters {sorted(wrong)}")


def _canonical_names(folder: TensorFolder, aliases: Sequence[tuple[str, str]], ignore: str) -> dict[str, str]:
    published = {}
    for name in folder.names():
        known = canonical(name, aliases)
        if ignore and re.fullmatch(ignore, known):
            continue
        if known in published:
            both = " and ".join(sorted((name, published[known])))
            raise ValueError(f"weights in {folder.path} hold one tensor under two names, {both}; keep the right one")
        published[known] = name
    return published


def _check_names(folder: TensorFolder, rules: Sequence[Rule], published: dict[str, str]) -> None:
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
    # a file of another model has many names that look alike, a renamed tensor is one of few
    near = (
        difflib.get_close_matches(missing[0], unknown, 1, 0.8) if missing and len(missing) + len(unknown) <= 16 else []
    )
    if near:
        remedy = f"If {near[0]} is {missing[0]}, give it that name; "
        remedy += "if not, check that folder and config.json are of this model"
    raise ValueError(f"weights in {folder.path} do not fit the model; {'; '.join(parts)}. {remedy}")


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in a message: the first `most` of them in alphabetical order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_shapes(folder: TensorFolder, rules: Sequence[Rule], published: dict[str, str], wanted: dict) -> None:
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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One parameter of ours where it is stored.

    Attributes:
      folder: that holds it.
      rule: its layout.
      sources: names of its tensors in the folder, in stacking order.
      shape: ours.
      dtype: wanted precision, or None for the stored one.
    """

    folder: TensorFolder
    rule: Rule
    sources: list[str]
    shape: tuple[int, ...]
    dtype: np.dtype | None

    def place(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """The parameter on its devices; what several devices hold is read once."""
        dtype, blocks = self._dtype(), {}

        def block(index: tuple[slice, ...]) -> np.ndarray:
            key = tuple(part.indices(size) for part, size in zip(index, self.shape))
            if key not in blocks:
                blocks[key] = self._block(index, dtype)
            return blocks[key]

        array = jax.make_array_from_callback(self.shape, sharding, block, dtype=dtype)
        # the copy on the host may go only when the devices have theirs, and must be gone before the next is read
        return jax.block_until_ready(array)

    def read(self) -> np.ndarray:
        """The whole parameter on the host."""
        return self._block((slice(None),) * len(self.shape), self._dtype())

    def _dtype(self) -> np.dtype:
        stored = {self.folder.read(source).dtype for source in self.sources}
        for dtype in stored:
            if not jnp.issubdtype(dtype, np.floating):
                source = next(name for name in self.sources if self.folder.read(name).dtype == dtype)
                raise ValueError(
                    f"{self.folder.file(source)} stores {source} as {dtype}, so the model is quantised; give weights "
                    "in float32, "
                    "float16 or bfloat16"
                )
        return np.dtype(functools.reduce(jnp.promote_types, stored)) if self.dtype is None else np.dtype(self.dtype)

    def _block(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        block = np.empty([len(range(*part.indices(size))) for part, size in zip(index, self.shape)], dtype)
        if self.rule.layers is None:
            self._fill(block, self.sources[0], index)
            return block
        for row, layer in enumerate(range(*index[0].indices(self.shape[0]))):
            self._fill(block[row, ...], self.sources[layer], index[1:])
        return block

    def _fill(self, block: np.ndarray, source: str, index: tuple[slice, ...]) -> None:
        """Copies a part of one tensor to its place, in our layout and precision."""
        tensor = self.rule.to_ours(self.folder.read(source))[index]
        _copy(tensor, block)
        if not count_non_finite(block):
            return
        if not count_non_finite(tensor):
            raise ValueError(
                f"{self.folder.file(source)}: {source} passes the range of {block.dtype}; read it as float32 or "
                "bfloat16"
            )
        raise ValueError(
            f"{self.folder.file(source)}: {source} holds NaN or infinity; copy the file again, or, if its source is "
            "the same, convert "
            "the weights again"
        )


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copies and casts; a transposed source in strips of one cache line of the target, several times faster than at
    once.
    """
    if source.ndim < 2 or source.strides[-1] <= min(source.strides) or source.size < 2**14:
        target[...] = source
        return
    strip = max(1, 64 // target.itemsize)
    for start in range(0, source.shape[-1], strip):
        target[..., start : start + strip] = source[..., start : start + strip]


def published_tensors(
    params: trees.Tree, rules: Sequence[Rule], dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The published names and arrays of a model's parameters; the inverse of `load_params`.

    Args:
      params: nested dictionaries of arrays.
      rules: the model's table.
      dtype: precision to cast to; None keeps what the parameters have.
    """
    leaves = trees.flatten(params)
    for rule in rules:
        leaf = np.asarray(leaves[rule.ours])
        leaf = leaf if dtype is None else leaf.astype(dtype)
        layers = [leaf] if rule.layers is None else list(leaf)
        for source, tensor in zip(rule.sources(), layers):
            yield source, rule.to_theirs(tensor)
