"""Sampling loops: guidance, the deterministic sampler, and rollouts with a stochastic window.

`predict(x [B, ...], sigma [] float32) -> velocity [B, ...]` stands for the whole denoiser, its
context and its guidance; the loops are one `lax.scan` over the schedule.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from uae_jax.diffusion.steps import EulerStep, sample_transition, step_log_prob


class Trajectory(NamedTuple):
    """What a rollout keeps: the W stochastic steps, and the final latents.

    latents, next_latents: float32 [W, B, ...], x before and after each step of the window.
    log_probs: float32 [W, B]. velocities: float32 [W, B, ...], what was predicted at `latents`.
    sigma_indices: int32 [W], positions in the schedule.
    final: float32 [B, ...], the latents at sigma 0.
    """

    latents: jax.Array
    next_latents: jax.Array
    log_probs: jax.Array
    velocities: jax.Array
    sigma_indices: jax.Array
    final: jax.Array


class Replay(NamedTuple):
    """A window scored again by a policy.

    log_probs: [W, B]. means, velocities: [W, B, ...]. stds: [W]. dts: [W], negative. float32.
    """

    log_probs: jax.Array
    means: jax.Array
    velocities: jax.Array
    stds: jax.Array
    dts: jax.Array


def _stack_contexts(negative, positive, batch):
    """Interleaves two context pytrees along the batch, [n0, p0, n1, p1, ...]; a negative of batch 1 is repeated.

    Interleaved, because a batch that is cut over devices then stays where it is.
    """

    def join(n, p):
        if n.shape[1:] != p.shape[1:] or n.shape[0] not in (1, batch) or p.shape[0] != batch:
            raise ValueError(
                f"negative context {n.shape} does not match positive context {p.shape} for a "
                f"batch of {batch}: pad both to one length"
            )
        pairs = jnp.stack([jnp.broadcast_to(n, p.shape).astype(p.dtype), p], axis=1)
        return pairs.reshape(2 * batch, *p.shape[1:])

    return jax.tree.map(join, negative, positive)


def guided_velocity(
    velocity_fn,
    x,
    sigma,
    context,
    negative_context=None,
    guidance_scale: float = 1.0,
    stop_negative_gradient: bool = False,
):
    """Classifier-free guidance `v_neg + w (v_pos - v_neg)` with one evaluation of the denoiser.

    Args:
      velocity_fn: `(x [M, ...], sigma [M], context) -> velocity [M, ...]`; called once with
        M = 2 B, rows ordered [negative 0, positive 0, negative 1, ...], or with M = B when there is no guidance, and
        for each half where the negative one has no gradient.
      x: latents [B, ...].
      sigma: noise level, [] or [B].
      context: pytree of arrays [B, ...].
      negative_context: the same structure, [B, ...] or [1, ...]; not used without guidance.
      guidance_scale: w, a Python number; exactly 1 skips the negative half.
      stop_negative_gradient: keep gradients out of the negative half (as flow_grpo trains), which
        is then evaluated apart, so that no backward pass is spent on it; the value does not change.

    Returns:
      float32 [B, ...]. Source: arXiv 2207.12598, as in diffusers' SD3 pipeline.

    Raises:
      ValueError: when guidance has no negative context, or the contexts differ in shape.
    """
    batch = x.shape[0]
    sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), (batch,))
    if guidance_scale == 1:
        return velocity_fn(x, sigma, context).astype(jnp.float32)
    if negative_context is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs a negative context: give one, or use 1")
    contexts = _stack_contexts(negative_context, context, batch)
    if stop_negative_gradient:
        halves = (jax.tree.map(lambda pairs: pairs[side::2], contexts) for side in (0, 1))
        negative, positive = (velocity_fn(x, sigma, half).astype(jnp.float32) for half in halves)
        negative = jax.lax.stop_gradient(negative)
    else:
        both = velocity_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(sigma, 2), contexts)
        pairs = both.astype(jnp.float32).reshape(batch, 2, *both.shape[1:])
        negative, positive = pairs[:, 0], pairs[:, 1]
    return negative + guidance_scale * (positive - negative)


def _euler_scan(predict, x, levels, next_levels, remat):
    def step(x, level):
        sigma, next_sigma = level
        mean, _ = EulerStep().transition(x, predict(x, sigma), sigma, next_sigma, sigma)
        return mean, None

    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, x, (levels, next_levels))[0]


def sample(predict, noise, sigmas, remat: bool = False, gradient_steps: int | None = None):
    """Deterministic Euler sampling, differentiable through every step.

    Args:
      predict: `(x [B, ...], sigma []) -> velocity [B, ...]`.
      noise: initial latents [B, ...] at sigma = sigmas[0].
      sigmas: [N + 1], decreasing, ending with 0 (`sigma_schedule`).
      remat: recompute each step's activations in the backward pass, so that memory holds one
        step's activations and N latents.
      gradient_steps: None for gradients through all steps; K for gradients through the last K
        only (DRaFT-K, arXiv 2309.17400), the latents before them being constants.

    Returns:
      float32 [B, ...]: the latents at sigma 0.

    Raises:
      ValueError: when gradient_steps is not between 1 and N.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    steps = sigmas.shape[0] - 1
    kept = steps if gradient_steps is None else gradient_steps
    if not 1 <= kept <= steps:
        raise ValueError(f"gradient_steps must be between 1 and {steps}, got {gradient_steps}")
    x = noise.astype(jnp.float32)
    split = steps - kept
    if split:

        def constant(x, sigma):
            return jax.lax.stop_gradient(predict(x, sigma))

        early = jax.lax.stop_gradient(x)
        early = _euler_scan(constant, early, sigmas[:split], sigmas[1 : split + 1], False)
        x = jax.lax.stop_gradient(early)
    return _euler_scan(predict, x, sigmas[split:-1], sigmas[split + 1 :], remat)


def window_start(key, low: int, high: int, window: int):
    """Draws the first stochastic step, uniform in [low, high - window] (both included).

    Draw it from the step's key, so that every sample and every host has the same window.

    Returns:
      int32 []. Raises ValueError when the range is shorter than the window.
    """
    if window < 1 or low < 0 or high - low < window:
        raise ValueError(f"a window of {window} steps does not fit into steps {low} to {high}")
    return jax.random.randint(key, (), low, high - window + 1)


def _check_window(steps, start, window):
    if not 1 <= window <= steps - 1:
        raise ValueError(
            f"the window must have 1 to {steps - 1} of the {steps} steps, got {window}: "
            "the last step, to sigma 0, is never stochastic"
        )
    if not isinstance(start, jax.core.Tracer) and not 0 <= int(start) <= steps - 1 - window:
        raise ValueError(f"a window of {window} steps from step {int(start)} does not end by step {steps - 1}")


def sample_window(predict, noise, sigmas, rule, window_start, window_size: int, keys):
    """A rollout: ODE steps outside a window, stochastic steps of `rule` inside it.

    Only the window is stored. `window_size = N - 1` from step 0 is the fully stochastic sampler
    of Flow-GRPO (the last step, to sigma 0, is never trained and stays deterministic); shorter
    windows are Flow-GRPO-Fast and MixGRPO (arXiv 2507.21802). One program serves every
    window_start. Gradients do not flow.

    Args:
      predict: `(x [B, ...], sigma []) -> velocity [B, ...]`.
      noise: initial latents [B, ...].
      sigmas: [N + 1], decreasing, ending with 0.
      rule: a step rule of `uae_jax.diffusion.steps`.
      window_start: first stochastic step, int []; may be traced, and is then bounded to
        [0, N - 1 - window_size].
      window_size: W, a Python int in [1, N - 1].
      keys: typed keys [B], one per sample; a step's noise is drawn from fold_in(key, step).

    Returns:
      `Trajectory`.

    Raises:
      ValueError: when the window does not fit.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    steps = sigmas.shape[0] - 1
    _check_window(steps, window_start, window_size)
    start = jnp.clip(jnp.asarray(window_start, jnp.int32), 0, steps - 1 - window_size)
    x = jax.lax.stop_gradient(noise.astype(jnp.float32))

    def step(carry, inputs):
        x, stored = carry
        index, sigma, next_sigma = inputs
        velocity = jax.lax.stop_gradient(predict(x, sigma))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        mean, std = rule.transition(x, velocity, sigma, next_sigma, sigmas[1])
        euler, _ = EulerStep().transition(x, velocity, sigma, next_sigma, sigmas[1])
        inside = (index >= start) & (index < start + window_size)
        x_next = jnp.where(inside, sample_transition(step_keys, mean, std), euler)
        # The stored latent is what gets scored, never a value fused with the draw.
        x_next, mean, std = jax.lax.optimization_barrier((x_next, mean, std))
        log_prob = step_log_prob(rule, x_next, mean, std)
        slot = jnp.clip(index - start, 0, window_size - 1)
        stored = jax.tree.map(
            lambda buffer, value: buffer.at[slot].set(jnp.where(inside, value, buffer[slot])),
            stored,
            (x, x_next, log_prob, velocity),
        )
        return (x_next, stored), None

    empty = jnp.zeros((window_size, *x.shape), jnp.float32)
    stored = (empty, empty, jnp.zeros((window_size, x.shape[0]), jnp.float32), empty)
    levels = (jnp.arange(steps), sigmas[:-1], sigmas[1:])
    (final, stored), _ = jax.lax.scan(step, (x, stored), levels)
    return Trajectory(*stored, start + jnp.arange(window_size), final)


def replay_window(predict, latents, next_latents, sigma_indices, sigmas, rule, remat: bool = False) -> Replay:
    """Scores the stored steps of a rollout with the present policy.

    Same transition, same log-probability, same batch shape as `sample_window`; differentiable in
    what `predict` closes over.

    Args:
      predict: `(x [B, ...], sigma []) -> velocity [B, ...]`, with the rollout's guidance.
      latents, next_latents: [W, B, ...] of a `Trajectory`.
      sigma_indices: int [W]; may be traced.
      sigmas: [N + 1], the rollout's schedule.
      rule: the rollout's step rule.
      remat: recompute each step's activations in the backward pass.

    Returns:
      `Replay`.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def score(_, inputs):
        x, x_next, index = inputs
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        velocity = predict(x, sigma)
        mean, std = rule.transition(x, velocity, sigma, next_sigma, sigmas[1])
        log_prob = step_log_prob(rule, x_next, mean, std)
        return None, Replay(log_prob, mean, velocity.astype(jnp.float32), std, next_sigma - sigma)

    body = jax.checkpoint(score, prevent_cse=False) if remat else score
    return jax.lax.scan(body, None, (latents, next_latents, sigma_indices))[1]
