"""Compiled functions of one batch size over any number of rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from uae_jax import sharding


def in_batches(function: Callable[..., Any], size: int, *arrays: Any) -> Any:
    """Applies a function batch by batch; the last batch is filled with its first row, and its result shortened.

    Args:
      function: of arrays with `size` rows, to arrays with as many.
      size: of a batch.
      *arrays: trees of numpy arrays, all with the same number of rows.

    Returns:
      numpy arrays with a result for every row.
    """
    count, found = len(jax.tree.leaves(arrays)[0]), []
    for start in range(0, count, size):

        def part(leaf: np.ndarray) -> np.ndarray:
            chunk = leaf[start : start + size]
            return np.concatenate([chunk, np.repeat(chunk[:1], size - len(chunk), axis=0)])

        result = sharding.host_values(function(*jax.tree.map(part, arrays)))
        found.append(jax.tree.map(lambda leaf: leaf[: min(size, count - start)], result))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
