"""Drawings that part at one stochastic step: a shared beginning, one transition with noise of its own, an own end.

The members of a group then have one state in common, where the policy decides. Its mean there serves all of them, in
sampling and in every replay: one evaluation a group. Source: the shared prefix of Flow-GRPO-Fast's README.

Shape letters: n groups, m members of a group, d the dimensions of a latent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from uae_jax.diffusion.sampler import Predict, check_window
from uae_jax.diffusion.steps import EulerStep, StepRule, member_log_probs, sample_transition


class Branches(NamedTuple):
    """What a rollout keeps of groups that part at one step.

    Attributes:
      latents: the state of a group before the stochastic step.
      velocities: the prediction there.
      next_latents: of each member after that step.
      log_probs: of each member's transition.
      final: the members at sigma 0, those of a group together.
    """

    latents: Float32[Array, " n *d"]
    velocities: Float32[Array, " n *d"]
    next_latents: Float32[Array, " n m *d"]
    log_probs: Float32[Array, " n m"]
    final: Float32[Array, " n_m *d"]


def sample_branches(
    predict: Predict,
    predict_members: Predict,
    noise: Float[Array, " n *d"],
    sigmas: Float[Array, " levels"],
    rule: StepRule,
    index: int | Int[Array, ""],
    keys: Key[Array, " n m"],
) -> Branches:
    """A rollout of groups that part at step `index`; ODE steps before and after it, without gradients.

    A member is what `sampler.sample_window` draws from the noise of its group with a window of this one step. One
    program serves every index: a step that belongs to the other side is skipped, not computed and dropped.

    Args:
      predict: the guided denoiser of n rows.
      predict_members: the same of n * m rows.
      noise: initial latents of the groups.
      sigmas: N + 1 decreasing levels that end with 0.
      rule: the stochastic step.
      index: its number; a traced one is bounded to [0, N - 2].
      keys: one a member; its noise comes from `fold_in(key, index)`.

    Raises:
      ValueError: the step is the last one, or none.
    """
    steps, (groups, members) = sigmas.shape[0] - 1, keys.shape
    check_window(steps, index, 1)
    index = jnp.clip(jnp.asarray(index, jnp.int32), 0, steps - 2)
    # the last step is never stochastic, and no step before the first one
    x = _ode(predict, jax.lax.stop_gradient(noise.astype(jnp.float32)), sigmas, slice(0, -2), lambda n: n < index)
    velocity = predict(x, sigmas[index])
    mean, std = rule.transition(x, velocity, sigmas[index], sigmas[index + 1], sigmas[1])
    own = jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), index)
    after = sample_transition(own, jnp.repeat(mean, members, axis=0), std)
    # the latent that is scored is the stored one, never a value fused with its sampling
    after, mean, std = jax.lax.optimization_barrier((after, mean, std))
    outcomes = after.reshape(groups, members, *mean.shape[1:])
    final = _ode(predict_members, after, sigmas, slice(1, None), lambda number: number > index)
    found = Branches(x, velocity, outcomes, member_log_probs(rule, outcomes, mean, std), final)
    return jax.lax.stop_gradient(found)


def finish(
    predict: Predict, x: Float[Array, " n *d"], sigmas: Float[Array, " levels"], index: int | Int[Array, ""]
) -> Float32[Array, " n *d"]:
    """The latents at sigma 0 that the ODE reaches from a state before step `index`, which may be traced."""
    return _ode(predict, x.astype(jnp.float32), sigmas, slice(0, None), lambda number: number >= index)


def _ode(
    predict: Predict,
    x: Float32[Array, " n *d"],
    sigmas: Float[Array, " levels"],
    kept: slice,
    wanted: Callable[[Array], Array],
) -> Float32[Array, " n *d"]:
    """ODE steps from x: those of `kept` whose number is wanted; the others are skipped."""

    def step(x: Array, level: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, sigma, next_sigma = level

        def moved(x: Array) -> Array:
            return EulerStep().transition(x, predict(x, sigma), sigma, next_sigma, sigmas[1])[0]

        return jax.lax.cond(wanted(number), moved, lambda x: x, x), None

    levels = jnp.arange(sigmas.shape[0] - 1), sigmas[:-1], sigmas[1:]
    return jax.lax.scan(step, x, jax.tree.map(lambda leaf: leaf[kept], levels))[0]
