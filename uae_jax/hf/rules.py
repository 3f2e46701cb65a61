"""Tables that say which published tensor is which parameter of ours, and the loader that checks them both ways."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from uae_jax import trees
from uae_jax.hf.safetensors import TensorFolder


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

    def to_theirs(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.layout == "dense":
            return tensor.T
        if self.layout == "conv":
            return tensor.transpose(3, 2, 0, 1)
        if self.layout == "patch":
            return tensor.T.reshape(self.torch_shape)
        return tensor


def load_params(
    folder: TensorFolder, rules: Sequence[Rule], abstract: trees.Tree, *, aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "", dtype: np.dtype | None = None) -> dict:
    """Reads every parameter of a model, after checking that names and shapes agree both ways.

    Args:
      folder: where the tensors are.
      rules: one for each leaf of `abstract`.
      abstract: the model's parameters as shapes (`jax.eval_shape` of its initialisation).
      aliases: (regular expression, replacement) pairs that turn other published names into those of the rules.
      ignore: regular expression of published names that are not parameters (buffers, tied copies, other parts).
      dtype: precision to cast floating tensors to; None keeps what is stored.

    Returns:
      Nested dictionaries of numpy arrays with the structure of `abstract`.

    Raises:
      ValueError: a tensor is missing, unknown, there twice, or of another shape; all are named, with the folder.
    """
    wanted = trees.flatten(abstract)
    _check_table(rules, wanted)
    published = _canonical_names(folder, aliases, ignore)
    _check_names(folder, rules, published)
    _check_shapes(folder, rules, published, wanted)
    return trees.unflatten({rule.ours: _read(folder, rule, published, wanted[rule.ours], dtype) for rule in rules})


def check_params(
    folder: TensorFolder, rules: Sequence[Rule], abstract: trees.Tree, *, aliases: Sequence[tuple[str, str]] = (),
    ignore: str = "") -> None:
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
        if not np.isfinite(folder.read(name)).all():
            raise ValueError(f"{folder.files[name]}: {name} holds NaN or infinity; copy the file again")


def _check_table(rules: Sequence[Rule], wanted: dict) -> None:
    names = [rule.ours for rule in rules]
    wrong = set(names) ^ set(wanted)
    if wrong or len(names) != len(set(names)):
        raise ValueError(f"rule table and model disagree on the parameters {sorted(wrong)}")


def _canonical_names(folder: TensorFolder, aliases: Sequence[tuple[str, str]], ignore: str) -> dict[str, str]:
    published = {}
    for name in folder.names():
        canonical = name
        for pattern, replacement in aliases:
            canonical = re.sub(pattern, replacement, canonical)
        if ignore and re.fullmatch(ignore, canonical):
            continue
        if canonical in published:
            both = " and ".join(sorted((name, published[canonical])))
            raise ValueError(f"weights in {folder.path} hold one tensor under two names, {both}; keep the right one")
        published[canonical] = name
    return published


def _check_names(folder: TensorFolder, rules: Sequence[Rule], published: dict[str, str]) -> None:
    expected = {source for rule in rules for source in rule.sources()}
    missing = sorted(expected - set(published))
    unknown = sorted(published[name] for name in set(published) - expected)
    if missing or unknown:
        parts = [f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(
            f"weights in {folder.path} do not fit the model; {'; '.join(parts)}. "
            "Check that the folder holds this model and that its config.json belongs to it")


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_shapes(folder: TensorFolder, rules: Sequence[Rule], published: dict[str, str], wanted: dict) -> None:
    wrong = []
    for rule in rules:
        target = tuple(wanted[rule.ours].shape)
        target = target if rule.layers is None else target[1:]
        for source in rule.sources():
            stored = folder.shape(published[source])
            blank = np.broadcast_to(np.zeros((), np.int8), stored)
            if rule.to_ours(blank).shape != target:
                wrong.append(f"{source} is {list(stored)}, the model needs {list(target)} for {rule.ours}")
    if wrong:
        raise ValueError(f"shapes in {folder.path} do not fit config.json: {'; '.join(wrong[:8])}")


def _read(folder: TensorFolder, rule: Rule, published: dict[str, str], like: jax.ShapeDtypeStruct, dtype) -> np.ndarray:
    def one(source: str) -> np.ndarray:
        tensor = rule.to_ours(folder.read(published[source]))
        return tensor if dtype is None else tensor.astype(dtype)

    if rule.layers is None:
        return np.asarray(one(rule.theirs), order="C")
    stacked = None
    for index, source in enumerate(rule.sources()):
        tensor = one(source)
        if stacked is None:
            stacked = np.empty(like.shape, tensor.dtype)
        stacked[index] = tensor
    return stacked


def published_tensors(params: trees.Tree, rules: Sequence[Rule], dtype: np.dtype | None = None) -> Iterator[tuple[str, np.ndarray]]:
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
