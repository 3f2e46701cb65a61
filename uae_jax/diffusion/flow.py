"""Rectified-flow training: noise levels, corruption, targets and the loss.

Convention of SD3 (arXiv 2403.03206, section 2): `x_s = (1 - s) x0 + s e` and
`v = dx/ds = e - x0`, with s = 1 pure noise and s = 0 the image. Everything is float32.
"""

import jax
import jax.numpy as jnp

from uae_jax.diffusion.schedule import shift_sigma

SCHEMES = ("logit_normal", "uniform", "mode", "cosmap")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")

# The smallest level of the 1000-entry table before the shift; below it 1 / s^2 is only noise.
_SMALLEST_WEIGHTED_SIGMA = 1e-3


def expand_sigma(sigma, x):
    """sigma [] or [B] reshaped so that it broadcasts against x [B, ...]; float32."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma


def _draw_levels(keys, scheme, logit_mean, logit_std, mode_scale):
    """One u in [0, 1] per key, [B]; u counts from the noise end."""
    if scheme == "logit_normal":
        normal = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
        return jax.nn.sigmoid(logit_mean + logit_std * normal)
    u = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    if scheme == "mode":
        return 1 - u - mode_scale * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)
    if scheme == "cosmap":
        sine, cosine = jnp.sin(jnp.pi * u / 2), jnp.cos(jnp.pi * u / 2)
        return sine / (sine + cosine)
    return u


def sample_sigmas(
    keys,
    scheme: str = "logit_normal",
    shift: float = 1.0,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    table: int | None = None,
):
    """Draws one training noise level per sample.

    Args:
      keys: typed PRNG keys [B], one per sample, so that a sample's level does not depend on the
        batch it is in.
      scheme: density of u before the shift: "logit_normal" (sigmoid of a normal), "uniform",
        "mode" (heavy tails, `mode_scale`), "cosmap" (arXiv 2403.03206, section 3.1).
      shift: static shift applied to the level; 1 for none, 3 for SD3.
      logit_mean, logit_std: of the normal; a positive mean moves towards the image, because u
        counts from the noise end (as in diffusers' SD3 training script).
      mode_scale: s of the mode scheme.
      table: None for continuous levels; a number of entries (1000 in SD3) to use
        `floor(table * u)` as the index into the descending table of once-shifted levels.

    Returns:
      float32 [B] in [0, 1] (in [shifted 1 / table, 1] with a table).

    Raises:
      ValueError: for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown sigma scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    u = _draw_levels(keys, scheme, logit_mean, logit_std, mode_scale)
    if table is None:
        sigma = 1 - u
    else:
        index = jnp.clip(jnp.floor(table * u), 0, table - 1)
        sigma = (table - index) / table
    return shift_sigma(jnp.clip(sigma, 0, 1), shift)


def loss_weight(sigma, weighting: str = "none", precondition: bool = False):
    """Weight of the squared velocity error at each noise level.

    Args:
      sigma: [B] in [0, 1].
      weighting: "none" is 1, "sigma_sqrt" is `s^-2` (s bounded below by 0.001), "cosmap" is
        `2 / (pi (1 - 2 s + 2 s^2))`. With `sample_sigmas` use "cosmap" either as the density or
        as the weight, not both.
      precondition: compare the implied images `x - s v` and `x0` in place of velocities. Since
        `(x - s v) - x0 = s (target - v)`, that is one more factor `s^2`
        (`precondition_outputs` of diffusers' SD3 training script).

    Returns:
      float32 [B].

    Raises:
      ValueError: for an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown loss weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    sigma = jnp.asarray(sigma, jnp.float32)
    if weighting == "sigma_sqrt":
        weight = jnp.maximum(sigma, _SMALLEST_WEIGHTED_SIGMA) ** -2
    elif weighting == "cosmap":
        weight = 2 / (jnp.pi * (1 - 2 * sigma + 2 * sigma**2))
    else:
        weight = jnp.ones_like(sigma)
    return weight * sigma**2 if precondition else weight


def corrupt(x0, noise, sigma):
    """`x_s = (1 - s) x0 + s e`, float32 [B, ...]; x0 and noise [B, ...], sigma [] or [B]."""
    x0, noise = x0.astype(jnp.float32), noise.astype(jnp.float32)
    sigma = expand_sigma(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_target(x0, noise):
    """`v = e - x0`, float32 [B, ...]."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def predict_x0(x, velocity, sigma):
    """The image a velocity implies, `x - s v`, float32 [B, ...]; sigma [] or [B]."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return x - expand_sigma(sigma, x) * velocity


def predict_noise(x, velocity, sigma):
    """The noise a velocity implies, `x + (1 - s) v`, float32 [B, ...]; sigma [] or [B]."""
    x, velocity = x.astype(jnp.float32), velocity.astype(jnp.float32)
    return x + (1 - expand_sigma(sigma, x)) * velocity


def flow_matching_loss(velocity, target, weight=None):
    """Weighted squared velocity error of each sample (arXiv 2403.03206, section 2).

    Args:
      velocity: prediction [B, ...].
      target: `velocity_target` [B, ...].
      weight: `loss_weight` [B], or None for 1.

    Returns:
      float32 [B]: the mean over all dimensions but the first, times the weight.
    """
    error = (velocity.astype(jnp.float32) - target.astype(jnp.float32)) ** 2
    loss = error.reshape(error.shape[0], -1).mean(axis=1)
    return loss if weight is None else weight.astype(jnp.float32) * loss
