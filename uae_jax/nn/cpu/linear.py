"""The product with an adapted kernel in the order that is less work for many tokens (LoRA, arXiv 2106.09685, eq. 3)."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merging_is_less_work(x: Float[Array, "... fan_in"], kernel: Float[Array, "fan_in fan_out"]) -> bool:
    """Whether tokens in float32 are better multiplied with the sum of kernel and adapter.

    That holds from about in * out / (in + out) tokens on. In half precision the sum would round a young adapter away.
    """
    tokens, (fan_in, fan_out) = math.prod(x.shape[:-1]), kernel.shape
    return x.dtype == jnp.float32 and tokens * (fan_in + fan_out) > fan_in * fan_out


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def merged_product(
    x: Float[Array, "... fan_in"],
    kernel: Float[Array, "fan_in fan_out"],
    a: Float[Array, "fan_in rank"],
    b: Float[Array, "rank fan_out"],
    scale: float,
) -> Float[Array, "... fan_out"]:
    """`x @ (kernel + scale * a @ b)`; all in one precision."""
    return x @ (kernel + scale * (a @ b))


def _forward(x: Array, kernel: Array, a: Array, b: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    return merged_product(x, kernel, a, b, scale), (x, kernel, a, b)


def _backward(scale: float, saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array, Array]:
    """By way of the adapter: to differentiate the sum of kernels takes as much work as to train the kernel."""
    x, kernel, a, b = saved
    rows, outer = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    through = scale * (outer @ b.T)
    return gradient @ (kernel + scale * (a @ b)).T, rows.T @ outer, rows.T @ through, scale * ((rows @ a).T @ outer)


merged_product.defvjp(_forward, _backward)
