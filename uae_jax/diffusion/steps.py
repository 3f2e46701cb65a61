"""One denoising step as a Gaussian transition, and the log-probability of its outcome.

A step rule turns a velocity into `(mean, std)` of the next latent. The sampler draws from it and
the policy loss scores it again; both call the same `transition` and `step_log_prob`, always in
float32. Notation: sigma and next_sigma are neighbouring levels of the schedule, next_sigma below
sigma; sigma_second is the schedule's second level.
Source: Flow-GRPO, arXiv 2505.05470, section 4.2, and its released step function.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from uae_jax.diffusion.flow import expand_sigma, predict_noise, predict_x0

KL_KINDS = ("gaussian", "gaussian_nodt", "velocity")

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def _inputs(x, velocity, sigma, next_sigma, sigma_second):
    """Everything in float32, levels broadcastable against x [B, ...]."""
    levels = (expand_sigma(level, x) for level in (sigma, next_sigma, sigma_second))
    return (x.astype(jnp.float32), velocity.astype(jnp.float32), *levels)


@dataclasses.dataclass(frozen=True)
class EulerStep:
    """The deterministic step of the probability-flow ODE."""

    def transition(self, x, velocity, sigma, next_sigma, sigma_second):
        """`mean = x + v dt` with `dt = next_sigma - sigma`, `std = 0`.

        Args:
          x, velocity: [B, ...].
          sigma, next_sigma, sigma_second: [] or [B]; may be traced. sigma_second is not used.

        Returns:
          (mean float32 [B, ...], std float32 broadcastable to it).
        """
        x, v, sigma, next_sigma, _ = _inputs(x, velocity, sigma, next_sigma, sigma_second)
        return x + v * (next_sigma - sigma), jnp.zeros_like(sigma)


@dataclasses.dataclass(frozen=True)
class SdeStep:
    """Flow-GRPO's SDE with the marginals of the ODE; noise_level is its `a`, 0.7 by default."""

    noise_level: float = 0.7

    def transition(self, x, velocity, sigma, next_sigma, sigma_second):
        """Euler-Maruyama step of the reverse SDE with `g = a sqrt(s / (1 - s))`.

        `mean = x + [v + g^2 / (2 s) (x + (1 - s) v)] dt`, `std = g sqrt(-dt)`; at s = 1 the
        denominator uses sigma_second, which makes `std = a` there for every schedule.
        Source: arXiv 2505.05470, section 4.2.

        Args:
          x, velocity: [B, ...].
          sigma, next_sigma, sigma_second: [] or [B] in [0, 1], sigma above 0; may be traced.

        Returns:
          (mean float32 [B, ...], std float32 broadcastable to it).
        """
        x, v, sigma, next_sigma, second = _inputs(x, velocity, sigma, next_sigma, sigma_second)
        dt = next_sigma - sigma
        remaining = 1 - jnp.where(sigma >= 1, second, sigma)
        drift = self.noise_level**2 / (2 * remaining)  # g^2 / (2 s), without dividing by s
        mean = x + (v + drift * (x + (1 - sigma) * v)) * dt
        return mean, self.noise_level * jnp.sqrt(sigma * -dt / remaining)


@dataclasses.dataclass(frozen=True)
class DanceStep:
    """DanceGRPO's SDE: the same reverse SDE with a constant diffusion coefficient eta."""

    eta: float = 0.3

    def transition(self, x, velocity, sigma, next_sigma, sigma_second):
        """`mean = x + [v + eta^2 / (2 s) (x + (1 - s) v)] dt`, `std = eta sqrt(-dt)`.

        Source: DanceGRPO, arXiv 2505.07818. Arguments and results as in `SdeStep`.
        """
        x, v, sigma, next_sigma, _ = _inputs(x, velocity, sigma, next_sigma, sigma_second)
        dt = next_sigma - sigma
        mean = x + (v + self.eta**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
        return mean, self.eta * jnp.sqrt(-dt)


@dataclasses.dataclass(frozen=True)
class CpsStep:
    """Coefficients-preserving sampling: the total noise coefficient stays next_sigma."""

    noise_level: float = 0.7

    def transition(self, x, velocity, sigma, next_sigma, sigma_second):
        """`std = s' sin(a pi / 2)`, `mean = (1 - s') x0 + sqrt(s'^2 - std^2) e`, s' = next_sigma.

        x0 and e are the image and the noise the velocity implies. Its log-probability is
        `cps_log_prob`, on another scale than that of the SDE rules. Source: arXiv 2509.05952,
        as released in flow_grpo. Arguments and results as in `SdeStep`; a in [0, 1].
        """
        x, v, sigma, next_sigma, _ = _inputs(x, velocity, sigma, next_sigma, sigma_second)
        angle = self.noise_level * math.pi / 2
        x0, noise = predict_x0(x, v, sigma), predict_noise(x, v, sigma)
        mean = (1 - next_sigma) * x0 + next_sigma * math.cos(angle) * noise
        return mean, next_sigma * math.sin(angle)


def sample_transition(key, mean, std):
    """Draws `mean + std z`, z standard normal.

    Args:
      key: typed keys [B], one per sample (the draw of a sample then does not depend on the batch
        it is in), or one key for the whole batch.
      mean: float32 [B, ...]; std broadcastable to it.

    Returns:
      float32 [B, ...].
    """
    if key.ndim:
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:], jnp.float32))(key)
    else:
        noise = jax.random.normal(key, mean.shape, jnp.float32)
    return mean + std * noise


def _per_sample_mean(x):
    return x.reshape(x.shape[0], -1).mean(axis=1)


def transition_log_prob(x_next, mean, std):
    """Gaussian log-density of the sampled latent, averaged (not summed) over its dimensions.

    x_next is a constant: no gradient flows into it. Samples with std = 0 (deterministic steps)
    have no density; their value and gradient are 0.

    Args:
      x_next, mean: [B, ...]; std broadcastable to them ([] or [B, 1, ...]).

    Returns:
      float32 [B]. Source: Flow-GRPO's released step function.
    """
    x_next, mean = x_next.astype(jnp.float32), mean.astype(jnp.float32)
    noisy = std > 0
    scale = jnp.where(noisy, std, 1.0)
    residual = jnp.where(noisy, (jax.lax.stop_gradient(x_next) - mean) / scale, 0.0)
    log_density = -0.5 * residual**2 - jnp.where(noisy, jnp.log(scale) + _HALF_LOG_TWO_PI, 0.0)
    return _per_sample_mean(log_density)


def cps_log_prob(x_next, mean, std):
    """`-mean((x' - mean)^2)`, the score of a CPS step: no variance and no constants; float32 [B].

    x_next is a constant. Samples with std = 0 score 0. Arguments as in `transition_log_prob`.
    """
    residual = jax.lax.stop_gradient(x_next.astype(jnp.float32)) - mean.astype(jnp.float32)
    return -_per_sample_mean(jnp.where(std > 0, residual, 0.0) ** 2)


def step_log_prob(rule, x_next, mean, std):
    """The log-probability that belongs to a step rule: `cps_log_prob` for `CpsStep`, otherwise
    `transition_log_prob`; float32 [B]."""
    score = cps_log_prob if isinstance(rule, CpsStep) else transition_log_prob
    return score(x_next, mean, std)


def gaussian_kl(mean, mean_ref, std, kind="gaussian", *, dt=None, velocity=None, velocity_ref=None):
    """Divergence of one step from the reference policy's step, averaged over dimensions.

    Args:
      mean, mean_ref: transition means [B, ...] at the same x, level and guidance.
      std: shared transition std S, broadcastable to the means; 0 gives 0.
      kind: "gaussian": `mean((mu - mu_ref)^2) / (2 S^2)`, the exact KL of the paper;
        "gaussian_nodt": the released code's form with `g^2 = S^2 / (-dt)` in place of S^2, which
        weighs late steps more (0.004 with dt is about 0.04 without);
        "velocity": `mean((v - v_ref)^2)`.
      dt: next_sigma - sigma, [] or [B]; needed by "gaussian_nodt".
      velocity, velocity_ref: [B, ...]; needed by "velocity".

    Returns:
      float32 [B], at least 0; differentiable in mean (or velocity).

    Raises:
      ValueError: for an unknown kind or a missing argument of that kind.
    """
    if kind not in KL_KINDS:
        raise ValueError(f"unknown diffusion KL {kind!r}: choose one of {', '.join(KL_KINDS)}")
    if kind == "velocity":
        if velocity is None or velocity_ref is None:
            raise ValueError("the velocity KL needs velocity and velocity_ref")
        difference = velocity.astype(jnp.float32) - velocity_ref.astype(jnp.float32)
        return _per_sample_mean(difference**2)
    noisy = std > 0
    difference = mean.astype(jnp.float32) - mean_ref.astype(jnp.float32)
    scaled = jnp.where(noisy, difference / jnp.where(noisy, std, 1.0), 0.0)
    kl = 0.5 * _per_sample_mean(scaled**2)
    if kind == "gaussian":
        return kl
    if dt is None:
        raise ValueError("the gaussian_nodt KL needs dt = next_sigma - sigma")
    return kl * -jnp.asarray(dt, jnp.float32)
