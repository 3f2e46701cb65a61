"""The state of a stage, one optimizer update of it, and its metrics; `methods.method` makes the train step of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax import trees

PyTree = Any
Metrics = Mapping[str, Any]  # arrays, or (sum, count) pairs of them


class TrainState(flax.struct.PyTreeNode):
    """Everything a stage changes: donated to the step, sharded, checkpointed.

    Attributes:
      step: int32 [], calls of `train_step` so far.
      updates: int32 [], optimizer updates applied so far.
      skipped: int32 [], optimizer updates skipped so far because a gradient was not finite.
      params: trainable parameters only.
      opt_state: optax state of `params`.
      ema: moving average of `params`, or None when it is switched off.
      old: the policy that makes rollouts, a moving average that follows `params`; None where `params` make them.
    """

    step: jax.Array
    updates: jax.Array
    skipped: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None = None
    old: PyTree | None = None


class OldPolicy(NamedTuple):
    """How the policy of the rollouts follows the trained one: its decay is `min(ceiling, rate * step)`.

    Source: DiffusionNFT, arXiv 2509.16117, section 3.3.
    """

    rate: float
    ceiling: float


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False, old: bool = False
) -> TrainState:
    """State at step 0; `ema` and `old` begin at `params`.

    Parameters are copied: donating the state must not delete the caller's arrays, nor alias the averages.
    """

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    params = jax.tree.map(jnp.copy, params)
    average, policy = (jax.tree.map(jnp.copy, params) if wanted else None for wanted in (ema, old))
    return TrainState(zero(), zero(), zero(), params, optimizer.init(params), average, policy)


def step_key(root: jax.Array, name: str, step: jax.Array | int) -> jax.Array:
    """Key of the stream `name` at `step`: fold_in(fold_in(root, crc32(name)), step)."""
    return jax.random.fold_in(trees.name_key(root, name), step)


def ema_decay_at(updates: jax.Array, decay: float) -> jax.Array:
    """float32 []: min(decay, (1 + k) / (10 + k)), k = optimizer updates applied before this one (the warm-up of
    Flow-GRPO).
    """
    k = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + k) / (10.0 + k))


def follow(state: TrainState, how: OldPolicy) -> PyTree:
    """`state.old` after a step's updates; `state.step` counts the steps before this one."""
    decay = jnp.minimum(how.ceiling, how.rate * state.step.astype(jnp.float32))
    return jax.tree.map(lambda old, new: (decay * old + (1.0 - decay) * new).astype(old.dtype), state.old, state.params)


def apply_gradients(
    state: TrainState,
    gradients: PyTree,
    loss: jax.Array,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> tuple[TrainState, jax.Array]:
    """One optimizer update, and the moving average after it. A non-finite loss or gradient leaves everything but
    `skipped` as is.

    Returns:
      the state (its `step` untouched) and the global gradient norm [] before clipping.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    changes, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    ema = state.ema
    if ema_decay is not None:
        decay = ema_decay_at(state.updates, ema_decay)
        ema = jax.tree.map(lambda old, new: (decay * old + (1.0 - decay) * new).astype(old.dtype), state.ema, params)
    finite &= jnp.isfinite(optax.tree.norm(params))  # an update may overflow where its gradient does not
    new = state.replace(params=params, opt_state=opt_state, ema=ema, updates=state.updates + 1)
    old = state.replace(skipped=state.skipped + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), norm


def as_pairs(metrics: Metrics) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every metric as a float32 (sum, count) pair without gradient."""

    def pair(value: Any) -> tuple[jax.Array, jax.Array]:
        total, count = value if isinstance(value, tuple) else (value, 1.0)
        return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)

    return jax.lax.stop_gradient({name: pair(value) for name, value in metrics.items()})


def join_metrics(*groups: Metrics) -> dict[str, jax.Array]:
    """Merges metric dicts into float32 means. Raises ValueError when two of them use one name."""
    merged: dict[str, jax.Array] = {}
    for group in groups:
        twice = sorted(merged.keys() & group.keys())
        if twice:
            raise ValueError(f"metric {twice[0]!r} is reported twice; rename it in the rollout or in the loss")
        for name, (total, count) in as_pairs(group).items():
            merged[name] = jnp.where(count > 0, total / jnp.maximum(count, 1e-8), 0.0)
    return merged
