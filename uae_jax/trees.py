"""Parameter trees by leaf name, and batches worked on one part at a time.

A leaf name is the path of a leaf joined by slashes, for example `layers/attention/query/kernel`.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = Any


def leaf_name(path: tuple[Any, ...]) -> str:
    """The leaf name of a `jax.tree_util` key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """All leaves by name, in tree order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from leaves by name; the inverse of `flatten` for trees of dictionaries."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def map_with_name(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Applies `function(name, leaf)` to each leaf."""
    return jax.tree.map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)


def parameter_count(tree: Tree) -> int:
    """The number of scalars in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def name_key(key: jax.Array, name: str) -> jax.Array:
    """Folds a name into a random key by CRC-32, which is the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def cut(tree: Tree, parts: int, group_size: int = 1) -> Tree:
    """Splits `[N, ...]` leaves into `[parts, N / parts, ...]`: group i goes to part i mod parts.

    Groups stay complete and in order. `parts * group_size` has to divide N. The split is interleaved, so with N sharded
    over devices every part keeps the same share of every device.
    """

    def cut_leaf(leaf: jax.Array) -> jax.Array:
        # [N, ...] -> [N / (parts * G), parts, G, ...] -> [parts, N / parts, ...]
        blocks = leaf.reshape(-1, parts, group_size, *leaf.shape[1:])
        return jnp.moveaxis(blocks, 1, 0).reshape(parts, -1, *leaf.shape[1:])

    return jax.tree.map(cut_leaf, tree)


def map_parts(function: Callable[[Tree], Tree], parts: Tree) -> Tree:
    """Applies `function` to each part of `cut` (groups of one) in turn; joins the results in the order before `cut`.

    Leaves of a result are `[N / parts, ...]`, or `[N / parts * G, ...]` with the G of a row together.
    """
    first = jax.tree.leaves(parts)[0]
    if len(first) == 1:
        # inside a loop of one turn, XLA's CPU backend would run convolutions on a single thread
        return function(jax.tree.map(lambda leaf: leaf[0], parts))
    return jax.tree.map(lambda leaf: joined(leaf, first.shape[1]), jax.lax.map(function, parts))


def joined(leaf: jax.Array, rows: int) -> jax.Array:
    """`[parts, rows * G, ...]` to `[parts * rows * G, ...]`; the inverse of `cut` for the G of each row."""
    blocks = leaf.reshape(leaf.shape[0], rows, -1, *leaf.shape[2:])
    return jnp.moveaxis(blocks, 0, 1).reshape(-1, *leaf.shape[2:])
