"""How much of a gradient is noise, from two independent halves of a batch.

With the true gradient G and the covariance S of one sample's gradient, halves a and b of n samples have
`E[a . b] = |G|^2` and `E[(|a|^2 + |b|^2) / 2] = |G|^2 + tr S / n`. The noise scale `tr S / |G|^2` is the number of
samples at which noise and signal are equal. Source: McCandlish et al., arXiv 1812.06162, appendix A.1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from uae_jax.rl.losses import Metrics

Gradients = PyTree[Float[Array, "..."]]


def noise_metrics(one: Gradients, other: Gradients, samples: int) -> Metrics:
    """Metrics of the mean gradients of two halves of `samples` samples each.

    Returns:
      `gradient_cosine`, q; `gradient_signal`, a . b, which estimates |G|^2; and `noise_scale` in samples,
      `n (|a|^2 + |b|^2 - 2 a . b) / (2 a . b)`, whose two parts are averaged over updates before they are divided. It
      is 0 where a . b is not positive: there is more noise than can be measured.
    """

    def dot(first: Gradients, second: Gradients) -> Array:
        products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), first, second)
        return sum(jax.tree.leaves(products), jnp.zeros(()))

    signal, squares = dot(one, other), (dot(one, one), dot(other, other))
    share = signal / jnp.maximum(sum(squares) / 2, 1e-30)  # of the signal in the mean square
    return {
        "gradient_cosine": (signal / jnp.maximum(jnp.sqrt(squares[0] * squares[1]), 1e-30), jnp.ones(())),
        "gradient_signal": (signal, jnp.ones(())),
        "noise_scale": (samples * (1.0 - share), share),
    }
