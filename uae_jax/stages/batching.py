"""Compiled functions of one batch size over any number of rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from uae_jax import sharding


def in_batches(
    function: Callable[..., Any],
    size: int,
    *arrays: Any,
    mesh: Mesh | None = None,
    done: Callable[[int], Any] = lambda rows: None,
) -> Any:
    """Applies a function batch by batch; the last batch is filled with its first row, and its result shortened.

    Args:
      function: of arrays with as many rows as a batch, to arrays with as many.
      size: of a batch; on a mesh it is rounded up to a multiple of the devices that share a batch.
      *arrays: trees of numpy arrays, all with the same number of rows, the same in every process.
      mesh: where each batch is sharded over devices; None for the function's own placement.
      done: called with the number of rows of each batch that is done.

    Returns:
      numpy arrays with a result for every row.
    """
    size = whole_batch(size, mesh)
    count, found = len(jax.tree.leaves(arrays)[0]), []
    for start in range(0, count, size):

        def part(leaf: np.ndarray) -> np.ndarray:
            chunk = leaf[start : start + size]
            return np.concatenate([chunk, np.repeat(chunk[:1], size - len(chunk), axis=0)])

        result = sharding.host_values(function(*on_mesh(jax.tree.map(part, arrays), mesh)))
        found.append(jax.tree.map(lambda leaf: leaf[: min(size, count - start)], result))
        done(min(size, count - start))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def whole_batch(size: int, mesh: sharding.Axes | None) -> int:
    """The size rounded up to a multiple of the devices that share a batch."""
    ways = _ways(mesh)
    return -(-size // ways) * ways


def on_mesh(rows: Any, mesh: Mesh | None) -> Any:
    """Trees of numpy arrays `[B, ...]`, the same in every process, sharded over the devices that share a batch."""
    if mesh is None or _ways(mesh) == 1:
        return rows
    return sharding.shard_rows(rows, mesh)


def _ways(mesh: sharding.Axes | None) -> int:
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
