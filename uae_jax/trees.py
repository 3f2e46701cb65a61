"""Names of the leaves of parameter trees, ways to split and merge trees by name, and to work on a batch a part at a
time.

A name is the path of a leaf joined by slashes, for example `layers/attention/query/kernel`.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def leaf_name(path: tuple) -> str:
    """The slash-joined name of a `jax.tree_util` key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def flatten(tree: Tree) -> dict[str, Any]:
    """All leaves by name, in tree order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(leaves: Mapping[str, Any]) -> dict:
    """Nested dictionaries from leaves by name; the inverse of `flatten` for trees of dictionaries."""
    tree: dict = {}
    for name, leaf in leaves.items():
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_with_name(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Applies `function(name, leaf)` to each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)


def merge(base: Tree, update: Mapping) -> Tree:
    """`base` with the leaves of `update` in place of its own.

    Raises:
      KeyError: a leaf of `update` is not in `base`.
    """
    if not isinstance(update, Mapping):
        return update
    unknown = set(update) - set(base)
    if unknown:
        raise KeyError(f"not in the tree to update: {sorted(unknown)}")
    return {key: merge(value, update[key]) if key in update else value for key, value in base.items()}


def parameter_count(tree: Tree) -> int:
    """The number of scalars in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def name_key(key: jax.Array, name: str) -> jax.Array:
    """Folds a name into a random key by a hash that is the same in every process (CRC-32)."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def cut(tree: Tree, parts: int, group_size: int = 1) -> Tree:
    """Cuts `[N, ...]` leaves into `[parts, N / parts, ...]`: group i goes to part i mod parts, groups stay whole and in
    order.

    Interleaved rather than contiguous: with N sharded over devices, every part keeps the same share of every device.
    `parts * group_size` has to divide N.
    """

    def cut_leaf(leaf: jax.Array) -> jax.Array:
        # [N, ...] -> [N / (parts * G), parts, G, ...] -> [parts, N / parts, ...]
        blocks = leaf.reshape(-1, parts, group_size, *leaf.shape[1:])
        return jnp.moveaxis(blocks, 1, 0).reshape(parts, -1, *leaf.shape[1:])

    return jax.tree.map(cut_leaf, tree)


def map_parts(function: Callable[[Tree], Tree], parts: Tree) -> Tree:
    """`function` of one part of `cut` (in groups of one) after the other; what it makes is joined to `[N, ...]` in the
    order before the cut.
    """
    if (
        len(jax.tree.leaves(parts)[0]) == 1
    ):  # not a loop of one, in which XLA's CPU backend runs convolutions on a single thread
        return function(jax.tree.map(lambda leaf: leaf[0], parts))
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), jax.lax.map(function, parts)
    )
