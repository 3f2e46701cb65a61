"""What the machine can do at best, measured: products of large matrices, and copying."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SIDES = {"cpu": 2048}  # of the matrices
LENGTHS = {"cpu": 2**26}  # bytes that are copied
CALLS = 10


def _fastest(call: Callable[[jax.Array], jax.Array], x: jax.Array, rounds: int = 3) -> float:
    """Seconds of one call, of many in a row; each is given what the one before returned."""
    x = jax.block_until_ready(call(x))
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(CALLS):
            x = call(x)
        jax.block_until_ready(x)
        seconds.append((time.perf_counter() - begin) / CALLS)
    return min(seconds)


def machine_rates(dtype: str) -> dict[str, float]:
    """Rates of this process's first device.

    Args:
      dtype: of the matrices.

    Returns:
      `matrix_rate`, floating-point operations a second; `copy_bandwidth`, bytes read and written a second.
    """
    platform = jax.devices()[0].platform
    side, length = SIDES.get(platform, 8192), LENGTHS.get(platform, 2**30)
    # random, since cards multiply equal numbers faster; scaled, so that product after product keeps its size
    matrix = (jax.random.normal(jax.random.key(0), (side, side)) / side**0.5).astype(dtype)
    product = jax.jit(lambda x, y: x @ y)
    scaled = jax.jit(lambda x: x * jnp.float32(1.0001), donate_argnums=0)
    return {
        "matrix_rate": 2 * side**3 / _fastest(lambda x: product(x, matrix), matrix),
        "copy_bandwidth": 2 * length / _fastest(scaled, jnp.ones(length // 4, jnp.float32)),
    }
