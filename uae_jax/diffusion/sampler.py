"""Sampling loops: guidance, the deterministic sampler, and rollouts with a stochastic window.

`predict` stands for the denoiser with its context and guidance. Each loop is one `lax.scan` over the schedule. Shape
letters: n samples, d the dimensions of a latent, w steps of the window.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int, Int32, Key, PyTree, Shaped

from uae_jax.diffusion.steps import EulerStep, StepRule, member_log_probs, sample_transition, step_log_prob

# (latents, sigma) -> velocity
Predict = Callable[[Float[Array, " n *d"], Float[Array, ""]], Float[Array, " n *d"]]


class Trajectory(NamedTuple):
    """What a rollout keeps: the stochastic steps of its window, and the final latents.

    Attributes:
      latents, next_latents: before and after each step of the window.
      log_probs: of each step.
      velocities: the predictions at `latents`.
      sigma_indices: positions in the schedule.
      final: the latents at sigma 0.
    """

    latents: Float32[Array, "w n *d"]
    next_latents: Float32[Array, "w n *d"]
    log_probs: Float32[Array, "w n"]
    velocities: Float32[Array, "w n *d"]
    sigma_indices: Int32[Array, " w"]
    final: Float32[Array, " n *d"]


class Replay(NamedTuple):
    """A window scored again by a policy; `dts` are `next_sigma - sigma`, negative.

    Log-probabilities have one more axis where a state has several outcomes.
    """

    log_probs: Float32[Array, "w n *m"]
    means: Float32[Array, "w n *d"]
    velocities: Float32[Array, "w n *d"]
    stds: Float32[Array, " w"]
    dts: Float32[Array, " w"]


def _stack_contexts(
    negative: PyTree[Shaped[Array, "#n ..."]], positive: PyTree[Shaped[Array, "n ..."]], batch: int
) -> PyTree[Shaped[Array, "..."]]:
    """Interleaves two contexts along the batch, [n0, p0, n1, p1, ...]; a negative of batch 1 is repeated.

    A row of a sharded batch then stays on its device.
    """

    def join(n: Array, p: Array) -> Array:
        if n.shape[1:] != p.shape[1:] or n.shape[0] not in (1, batch) or p.shape[0] != batch:
            raise ValueError(
                f"negative context {n.shape} does not match positive context {p.shape} for a "
                f"batch of {batch}: pad both to one length"
            )
        pairs = jnp.stack([jnp.broadcast_to(n, p.shape).astype(p.dtype), p], axis=1)
        return pairs.reshape(2 * batch, *p.shape[1:])

    return jax.tree.map(join, negative, positive)


def linear_guidance(
    positive: Float32[Array, " n *d"], negative: Float32[Array, " n *d"], scale: float | Float[Array, "n ..."]
) -> Float32[Array, " n *d"]:
    """`v_neg + w (v_pos - v_neg)`, classifier-free guidance (arXiv 2207.12598), as in diffusers' SD3 pipeline."""
    return negative + scale * (positive - negative)


def guided_velocity(
    velocity_fn: Callable[[Float[Array, " m *d"], Float[Array, " m"], PyTree], Float[Array, " m *d"]],
    x: Float[Array, " n *d"],
    sigma: Float[Array, ""],
    context: PyTree[Shaped[Array, "n ..."]],
    negative_context: PyTree[Shaped[Array, "#n ..."]] | None = None,
    guidance_scale: float | Float[Array, " n"] = 1.0,
    stop_negative_gradient: bool = False,
    guide: Callable[[Array, Array, Any], Array] = linear_guidance,
) -> Float32[Array, " n *d"]:
    """The velocity of a caption, guided away from that of a negative prompt.

    Args:
      velocity_fn: the denoiser, `(latents, noise levels, context) -> velocity`. One call evaluates both halves, m = 2 n
        rows in the order [negative 0, positive 0, negative 1, ...]. Without guidance m = n.
      x: latents.
      sigma: noise level of all samples.
      context: of the prompts.
      negative_context: the same structure, one row each or one for all; not used without guidance.
      guidance_scale: w; exactly 1 is without guidance and skips the negative half. An array has the w of each sample,
        so that one program serves all guidances; the negative half is then always evaluated.
      stop_negative_gradient: no gradient for the negative half, as in flow_grpo's training. Each half is then a call
        of its own, so that no backward pass is spent on the negative one. The value does not change.
      guide: `(positive, negative, w) -> velocity` of the decoder.

    Raises:
      ValueError: guidance has no negative context, or the contexts differ in shape.
    """
    batch = x.shape[0]
    sigmas = jnp.broadcast_to(sigma, (batch,))
    if isinstance(guidance_scale, jax.Array):
        guidance_scale = guidance_scale.reshape(batch, *(1,) * (x.ndim - 1))
    elif guidance_scale == 1:
        return velocity_fn(x, sigmas, context).astype(jnp.float32)
    if negative_context is None:
        raise ValueError(f"guidance_scale={guidance_scale} needs a negative context: give one, or use 1")
    contexts = _stack_contexts(negative_context, context, batch)
    if stop_negative_gradient:
        halves = (jax.tree.map(lambda pairs: pairs[side::2], contexts) for side in (0, 1))
        negative, positive = (velocity_fn(x, sigmas, half).astype(jnp.float32) for half in halves)
        negative = jax.lax.stop_gradient(negative)
    else:
        both = velocity_fn(jnp.repeat(x, 2, axis=0), jnp.repeat(sigmas, 2), contexts)
        pairs = both.astype(jnp.float32).reshape(batch, 2, *both.shape[1:])
        negative, positive = pairs[:, 0], pairs[:, 1]
    return guide(positive, negative, guidance_scale)


def _euler_scan(
    predict: Predict,
    x: Float32[Array, " n *d"],
    levels: Float[Array, " steps"],
    next_levels: Float[Array, " steps"],
    remat: bool,
) -> Float32[Array, " n *d"]:
    def step(x: Array, level: tuple[Array, Array]) -> tuple[Array, None]:
        sigma, next_sigma = level
        mean, _ = EulerStep().transition(x, predict(x, sigma), sigma, next_sigma, sigma)
        return mean, None

    body = jax.checkpoint(step, prevent_cse=False) if remat else step
    return jax.lax.scan(body, x, (levels, next_levels))[0]


def sample(
    predict: Predict,
    noise: Float[Array, " n *d"],
    sigmas: Float[Array, " levels"],
    remat: bool = False,
    gradient_steps: int | None = None,
) -> Float32[Array, " n *d"]:
    """Latents at sigma 0 by deterministic Euler sampling, differentiable through every step.

    Args:
      predict: the guided denoiser.
      noise: initial latents at the first level.
      sigmas: N + 1 decreasing levels that end with 0 (`sigma_schedule`).
      remat: recompute the activations of each step in the backward pass. Memory then holds the activations of one
        step, and N latents.
      gradient_steps: None for gradients through all steps, K for the last K only (DRaFT-K, arXiv 2309.17400). The
        latents before them are constants.

    Raises:
      ValueError: `gradient_steps` is not between 1 and N.
    """
    steps = sigmas.shape[0] - 1
    kept = steps if gradient_steps is None else gradient_steps
    if not 1 <= kept <= steps:
        raise ValueError(f"gradient_steps must be between 1 and {steps}, got {gradient_steps}")
    x = noise.astype(jnp.float32)
    split = steps - kept
    if split:

        def constant(x: Array, sigma: Array) -> Array:
            return jax.lax.stop_gradient(predict(x, sigma))

        early = jax.lax.stop_gradient(x)
        early = _euler_scan(constant, early, sigmas[:split], sigmas[1 : split + 1], False)
        x = jax.lax.stop_gradient(early)
    return _euler_scan(predict, x, sigmas[split:-1], sigmas[split + 1 :], remat)


def window_start(key: Key[Array, ""], low: int, high: int, window: int) -> Int[Array, ""]:
    """Samples the first stochastic step, uniform in [low, high - window] (both included).

    With the key of the train step, every sample and every host has the same window.

    Raises:
      ValueError: the range is shorter than the window.
    """
    if window < 1 or low < 0 or high - low < window:
        raise ValueError(f"a window of {window} steps does not fit into steps {low} to {high}")
    return jax.random.randint(key, (), low, high - window + 1)


def check_window(steps: int, start: int | Int[Array, ""], window: int) -> None:
    """Raises ValueError for a window that does not fit into the steps before the last one; `start` may be traced."""
    if not 1 <= window <= steps - 1:
        raise ValueError(
            f"the window must have 1 to {steps - 1} of the {steps} steps, got {window}: "
            "the last step, to sigma 0, is never stochastic"
        )
    if not isinstance(start, Tracer) and not 0 <= int(start) <= steps - 1 - window:
        raise ValueError(f"a window of {window} steps from step {int(start)} does not end by step {steps - 1}")


def sample_window(
    predict: Predict,
    noise: Float[Array, " n *d"],
    sigmas: Float[Array, " levels"],
    rule: StepRule,
    window_start: int | Int[Array, ""],
    window_size: int,
    keys: Key[Array, " n"],
) -> Trajectory:
    """A rollout: stochastic steps of `rule` inside a window, ODE steps outside; without gradients.

    Only the window is stored. `window_size = N - 1` from step 0 is Flow-GRPO's fully stochastic sampler; its last step,
    to sigma 0, is never trained and stays deterministic. Shorter windows are Flow-GRPO-Fast and MixGRPO
    (arXiv 2507.21802). One program serves every `window_start`.

    Args:
      predict: the guided denoiser.
      noise: initial latents.
      sigmas: N + 1 decreasing levels that end with 0.
      rule: the stochastic step.
      window_start: first stochastic step; a traced one is bounded to [0, N - 1 - window_size].
      window_size: w, from 1 to N - 1.
      keys: one per sample; the noise of a step comes from `fold_in(key, step)`.

    Raises:
      ValueError: the window does not fit.
    """
    steps = sigmas.shape[0] - 1
    check_window(steps, window_start, window_size)
    start = jnp.clip(jnp.asarray(window_start, jnp.int32), 0, steps - 1 - window_size)
    x = jax.lax.stop_gradient(noise.astype(jnp.float32))

    def step(carry: tuple[Array, PyTree], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, PyTree], None]:
        x, stored = carry
        index, sigma, next_sigma = inputs
        velocity = jax.lax.stop_gradient(predict(x, sigma))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        mean, std = rule.transition(x, velocity, sigma, next_sigma, sigmas[1])
        euler, _ = EulerStep().transition(x, velocity, sigma, next_sigma, sigmas[1])
        inside = (index >= start) & (index < start + window_size)
        x_next = jnp.where(inside, sample_transition(step_keys, mean, std), euler)
        # the latent that is scored is the stored one, never a value fused with its sampling
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
    (final, (latents, next_latents, log_probs, velocities)), _ = jax.lax.scan(step, (x, stored), levels)
    return Trajectory(latents, next_latents, log_probs, velocities, start + jnp.arange(window_size), final)


def replay_window(
    predict: Predict,
    latents: Float[Array, "w n *d"],
    next_latents: Float[Array, "w n *d"] | Float[Array, "w n m *d"],
    sigma_indices: Int[Array, " w"],
    sigmas: Float[Array, " levels"],
    rule: StepRule,
) -> Replay:
    """Scores the stored steps of a rollout with the present policy; differentiable in what `predict` closes over.

    Transition, log-probability and batch shape are those of `sample_window`, or of `branching.sample_branches`: the m
    outcomes of one state share its mean, so that one evaluation scores them all.

    Args:
      predict: the denoiser, with the rollout's guidance.
      latents, next_latents, sigma_indices: of a `Trajectory`; the indices may be traced.
      sigmas: the rollout's schedule.
      rule: the rollout's step rule.
    """

    def score(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, Replay]:
        x, x_next, index = inputs
        sigma, next_sigma = sigmas[index], sigmas[index + 1]
        velocity = predict(x, sigma)
        mean, std = rule.transition(x, velocity, sigma, next_sigma, sigmas[1])
        score_of = step_log_prob if x_next.ndim == x.ndim else member_log_probs
        log_prob = score_of(rule, x_next, mean, std)
        return None, Replay(log_prob, mean, velocity.astype(jnp.float32), std, next_sigma - sigma)

    return jax.lax.scan(score, None, (latents, next_latents, sigma_indices))[1]
