"""Rectified-flow training: noise levels, corruption, targets and the loss.

Convention of SD3 (arXiv 2403.03206, section 2): `x_s = (1 - s) x0 + s e` and `v = dx/ds = e - x0`, with s = 1 pure
noise and s = 0 the image. Everything is computed in float32. Shape letters: n samples, d the dimensions of a latent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from uae_jax.diffusion.schedule import shift_sigma

SCHEMES = ("logit_normal", "uniform", "mode", "cosmap")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")

# SD3's heavy-tailed density: its scale s (arXiv 2403.03206, section 3.1)
_MODE_SCALE = 1.29
# the smallest of SD3's 1000 training levels before the shift; below it 1 / s^2 is only noise
_SMALLEST_WEIGHTED_SIGMA = 1e-3


def _expand(sigma: Float[Array, ""] | Float[Array, " n"], x: Float[Array, " n *d"]) -> Float32[Array, "..."]:
    """Noise levels, one for all samples or one each, shaped to broadcast against x."""
    return sigma.astype(jnp.float32).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _sample_unit(keys: Key[Array, " n"], scheme: str, stratum: tuple[int | Array, int] | None) -> Float32[Array, " n"]:
    """One u in [0, 1] per key, counted from the noise end."""
    if scheme == "logit_normal" and stratum is None:
        return jax.nn.sigmoid(jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys))
    u = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    if stratum is not None:
        u = (stratum[0] + u) / stratum[1]
    if scheme == "logit_normal":
        return jax.nn.sigmoid(jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1 - 1e-6)))
    if scheme == "mode":
        return 1 - u - _MODE_SCALE * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)
    if scheme == "cosmap":
        sine, cosine = jnp.sin(jnp.pi * u / 2), jnp.cos(jnp.pi * u / 2)
        return sine / (sine + cosine)
    return u


def sample_sigmas(
    keys: Key[Array, " n"],
    scheme: str = "logit_normal",
    shift: float = 1.0,
    stratum: tuple[int | Array, int] | None = None,
) -> Float32[Array, " n"]:
    """Samples one training noise level per sample, in [0, 1].

    Args:
      keys: one per sample, so that a sample's level does not depend on its batch.
      scheme: density before the shift: "logit_normal" (sigmoid of a standard normal), "uniform", "mode" (heavy tails),
        "cosmap" (arXiv 2403.03206, section 3.1).
      shift: static shift of the levels; 1 for none, 3 for SD3.
      stratum: (k, K) samples from the k-th of K parts of the density, equal in probability; None from all of it.

    Raises:
      ValueError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown sigma scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    return shift_sigma(jnp.clip(1 - _sample_unit(keys, scheme, stratum), 0, 1), shift)


def loss_weight(sigma: Float[Array, " n"], weighting: str = "none") -> Float32[Array, " n"]:
    """Weight of the squared velocity error at each noise level.

    Args:
      sigma: noise levels in [0, 1].
      weighting: "none" is 1, "sigma_sqrt" is `s^-2` with s at least 0.001, "cosmap" is `2 / (pi (1 - 2 s + 2 s^2))`.
        Use "cosmap" either here or as the density of `sample_sigmas`, not both.

    Raises:
      ValueError: an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown loss weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    sigma = sigma.astype(jnp.float32)
    if weighting == "sigma_sqrt":
        return jnp.maximum(sigma, _SMALLEST_WEIGHTED_SIGMA) ** -2
    if weighting == "cosmap":
        return 2 / (jnp.pi * (1 - 2 * sigma + 2 * sigma**2))
    return jnp.ones_like(sigma)


def corrupt(
    x0: Float[Array, " n *d"], noise: Float[Array, " n *d"], sigma: Float[Array, ""] | Float[Array, " n"]
) -> Float32[Array, " n *d"]:
    """`x_s = (1 - s) x0 + s e`."""
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = _expand(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_target(x0: Float[Array, " n *d"], noise: Float[Array, " n *d"]) -> Float32[Array, " n *d"]:
    """`v = e - x0`."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def predict_x0(
    x: Float[Array, " n *d"], velocity: Float[Array, " n *d"], sigma: Float[Array, ""] | Float[Array, " n"]
) -> Float32[Array, " n *d"]:
    """The image that a velocity implies, `x - s v`."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return x - _expand(sigma, x) * velocity


def predict_noise(
    x: Float[Array, " n *d"], velocity: Float[Array, " n *d"], sigma: Float[Array, ""] | Float[Array, " n"]
) -> Float32[Array, " n *d"]:
    """The noise that a velocity implies, `x + (1 - s) v`."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return x + (1 - _expand(sigma, x)) * velocity


def flow_matching_loss(
    velocity: Float[Array, " n *d"], target: Float[Array, " n *d"], weight: Float[Array, " n"]
) -> Float32[Array, " n"]:
    """Mean squared velocity error of each sample times its weight (arXiv 2403.03206, section 2).

    Args:
      velocity: the prediction.
      target: of `velocity_target`.
      weight: of `loss_weight`.
    """
    error = (velocity.astype(jnp.float32) - target.astype(jnp.float32)) ** 2
    return weight.astype(jnp.float32) * error.reshape(error.shape[0], -1).mean(axis=1)
