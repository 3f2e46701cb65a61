"""One denoising step as a Gaussian transition, and the log-probability of its outcome.

A step rule turns a velocity into mean and standard deviation of the next latent. The sampler samples from that
Gaussian and the policy loss scores the sample again. Both call the same `transition` and `step_log_prob`, in float32.

Levels: `sigma` and `next_sigma` are neighbours in the schedule, `next_sigma` below `sigma`; `sigma_second` is the
schedule's second level. Shape letters: n samples, d the dimensions of a latent.
Source: Flow-GRPO, arXiv 2505.05470, section 4.2, and its released step function.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Key

from uae_jax.diffusion.flow import predict_noise, predict_x0

KL_KINDS = ("gaussian", "gaussian_nodt", "velocity")

Latents = Float[Array, " n *d"]
Level = Float[Array, ""]
# mean and standard deviation of the next latent
Transition = tuple[Float32[Array, " n *d"], Float32[Array, ""]]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class EulerStep:
    """The deterministic step of the probability-flow ODE."""

    def transition(
        self, x: Latents, velocity: Latents, sigma: Level, next_sigma: Level, sigma_second: Level
    ) -> Transition:
        """`mean = x + v dt` with `dt = next_sigma - sigma`, `std = 0`; `sigma_second` is not used."""
        del sigma_second
        x, v = x.astype(jnp.float32), velocity.astype(jnp.float32)
        return x + v * (next_sigma - sigma), jnp.zeros_like(sigma)


@dataclasses.dataclass(frozen=True)
class SdeStep:
    """Flow-GRPO's SDE with the marginals of the ODE; `noise_level` is its `a`, 0.7 by default."""

    noise_level: float = 0.7

    def transition(
        self, x: Latents, velocity: Latents, sigma: Level, next_sigma: Level, sigma_second: Level
    ) -> Transition:
        """Euler-Maruyama step of the reverse SDE with `g = a sqrt(s / (1 - s))`; sigma in (0, 1].

        `mean = x + [v + g^2 / (2 s) (x + (1 - s) v)] dt`, `std = g sqrt(-dt)`. At s = 1 the denominator uses
        `sigma_second`, which makes `std = a` there for every schedule. Source: arXiv 2505.05470, section 4.2.
        """
        x, v = x.astype(jnp.float32), velocity.astype(jnp.float32)
        dt = next_sigma - sigma
        remaining = 1 - jnp.where(sigma >= 1, sigma_second, sigma)
        drift = self.noise_level**2 / (2 * remaining)  # g^2 / (2 s), without a division by s
        mean = x + (v + drift * (x + (1 - sigma) * v)) * dt
        return mean, self.noise_level * jnp.sqrt(sigma * -dt / remaining)


@dataclasses.dataclass(frozen=True)
class DanceStep:
    """DanceGRPO's SDE: the same reverse SDE with a constant diffusion coefficient eta."""

    eta: float = 0.3

    def transition(
        self, x: Latents, velocity: Latents, sigma: Level, next_sigma: Level, sigma_second: Level
    ) -> Transition:
        """`mean = x + [v + eta^2 / (2 s) (x + (1 - s) v)] dt`, `std = eta sqrt(-dt)`; sigma in (0, 1].

        `sigma_second` is not used. Source: DanceGRPO, arXiv 2505.07818.
        """
        del sigma_second
        x, v = x.astype(jnp.float32), velocity.astype(jnp.float32)
        dt = next_sigma - sigma
        mean = x + (v + self.eta**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
        return mean, self.eta * jnp.sqrt(-dt)


@dataclasses.dataclass(frozen=True)
class CpsStep:
    """Coefficients-preserving sampling: the total noise coefficient stays `next_sigma`; `noise_level` in [0, 1]."""

    noise_level: float = 0.7

    def transition(
        self, x: Latents, velocity: Latents, sigma: Level, next_sigma: Level, sigma_second: Level
    ) -> Transition:
        """`std = s' sin(a pi / 2)`, `mean = (1 - s') x0 + sqrt(s'^2 - std^2) e`, s' = next_sigma, a = noise_level.

        x0 and e are the image and the noise that the velocity implies; `sigma_second` is not used. The log-probability
        of this step, `cps_log_prob`, has another scale than that of the SDE rules.
        Source: arXiv 2509.05952, as released in flow_grpo.
        """
        del sigma_second
        angle = self.noise_level * math.pi / 2
        x0, noise = predict_x0(x, velocity, sigma), predict_noise(x, velocity, sigma)
        mean = (1 - next_sigma) * x0 + next_sigma * math.cos(angle) * noise
        return mean, next_sigma * math.sin(angle)


StepRule = SdeStep | DanceStep | CpsStep


def sample_transition(
    keys: Key[Array, " n"], mean: Float32[Array, " n *d"], std: Float32[Array, ""]
) -> Float32[Array, " n *d"]:
    """Samples `mean + std z` with z standard normal.

    Args:
      keys: one per sample, so that a sample's noise does not depend on its batch.
      mean, std: of a step rule's `transition`.
    """
    return mean + std * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], jnp.float32))(keys)


def _per_sample_mean(x: Float[Array, " n *d"]) -> Float[Array, " n"]:
    return x.reshape(x.shape[0], -1).mean(axis=1)


def transition_log_prob(x_next: Latents, mean: Latents, std: Float[Array, ""]) -> Float32[Array, " n"]:
    """Gaussian log-density of the sampled latent, averaged (not summed) over its dimensions.

    `x_next` is a constant: no gradient flows into it. A deterministic step, std = 0, has no density: value and
    gradient are 0. Source: Flow-GRPO's released step function.
    """
    x_next, mean = x_next.astype(jnp.float32), mean.astype(jnp.float32)
    noisy = std > 0
    scale = jnp.where(noisy, std, 1.0)
    residual = jnp.where(noisy, (jax.lax.stop_gradient(x_next) - mean) / scale, 0.0)
    log_density = -0.5 * residual**2 - jnp.where(noisy, jnp.log(scale) + _HALF_LOG_TWO_PI, 0.0)
    return _per_sample_mean(log_density)


def cps_log_prob(x_next: Latents, mean: Latents, std: Float[Array, ""]) -> Float32[Array, " n"]:
    """`-mean((x' - mean)^2)`, the score of a CPS step, without variance and constants.

    `x_next` is a constant. A step with std = 0 scores 0.
    """
    residual = jax.lax.stop_gradient(x_next.astype(jnp.float32)) - mean.astype(jnp.float32)
    return -_per_sample_mean(jnp.where(std > 0, residual, 0.0) ** 2)


def step_log_prob(rule: StepRule, x_next: Latents, mean: Latents, std: Float[Array, ""]) -> Float32[Array, " n"]:
    """The log-probability of a rule's step: `cps_log_prob` for `CpsStep`, otherwise `transition_log_prob`."""
    score = cps_log_prob if isinstance(rule, CpsStep) else transition_log_prob
    return score(x_next, mean, std)


def member_log_probs(
    rule: StepRule, next_latents: Float[Array, " n m *d"], mean: Float[Array, " n *d"], std: Float[Array, ""]
) -> Float32[Array, " n m"]:
    """`step_log_prob` of the m outcomes of each of n states."""
    return jax.vmap(lambda outcome: step_log_prob(rule, outcome, mean, std), in_axes=1, out_axes=1)(next_latents)


def gaussian_kl(
    mean: Latents,
    mean_ref: Latents,
    std: Float[Array, ""],
    kind: str = "gaussian",
    *,
    dt: Float[Array, ""] | None = None,
    velocity: Latents | None = None,
    velocity_ref: Latents | None = None,
) -> Float32[Array, " n"]:
    """Divergence of one step from the reference policy's step, averaged over dimensions; at least 0.

    Differentiable in `mean`, or in `velocity`.

    Args:
      mean, mean_ref: means of the transition at the same latent, level and guidance.
      std: their common standard deviation S; 0 gives 0.
      kind:
        "gaussian": `mean((mu - mu_ref)^2) / (2 S^2)`, the exact KL of the paper.
        "gaussian_nodt": the form of the released code, with `g^2 = S^2 / (-dt)` in place of S^2. It weighs late steps
          more; a weight of 0.004 with dt is about 0.04 without.
        "velocity": `mean((v - v_ref)^2)`.
      dt: next_sigma - sigma, negative; needed by "gaussian_nodt".
      velocity, velocity_ref: needed by "velocity".

    Raises:
      ValueError: an unknown kind, or a missing argument of that kind.
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
    return kl * -dt.astype(jnp.float32)
