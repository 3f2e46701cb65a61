"""Checksums of a state, equal on every mesh, so that a checkpoint is known to hold the numbers that were saved."""

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import trees
from uae_jax.files.json_files import json_digest

PyTree = Any
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of a number


def array_checksums(tree: PyTree) -> dict[str, int]:
    """A checksum of 32 bits for every array by leaf name.

    The checksum is the sum of all words, each times its own odd number, modulo 2^32. A change of one word always
    changes the sum, and the order of additions never does.

    Args:
      tree: arrays on devices, or numpy arrays.
    """
    leaves = trees.flatten(tree)
    if not leaves:
        return {}
    meshes = [
        leaf.sharding.mesh for leaf in leaves.values() if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    sums = np.asarray(_summed(meshes[0] if meshes else None)(list(leaves.values())))
    return {name: int(value) for name, value in zip(leaves, sums, strict=True)}


def json_checksum(value: Any) -> str:
    """A digest of a JSON-able value, as it is after it was written and read."""
    return json_digest(json.loads(json.dumps(value)))


def structure_checksum(tree: PyTree) -> str:
    """A digest of names, shapes and types of all leaves."""
    return json_digest({name: describe(leaf) for name, leaf in trees.flatten(tree).items()})


def describe(leaf: Any) -> str:
    """Type and shape of a leaf in words, such as float32[2, 3]."""
    return f"{leaf.dtype}{list(leaf.shape)}"


@functools.cache
def _summed(mesh: Any) -> Any:
    """The compiled sums of a list of arrays, uint32 [n], with all devices of a mesh."""
    placed = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]), out_shardings=placed)


def _checksum(leaf: jax.Array) -> jax.Array:
    """The checksum of one array, uint32 []."""
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    words = lax.bitcast_convert_type(leaf, _WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        step = math.prod(words.shape[axis + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(step)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
