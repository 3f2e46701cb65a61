"""The train step: one pure function for every stage.

A stage writes an `Algorithm`: `rollout` makes samples with the parameters of the beginning of the step, `loss` scores
them. `make_train_step` turns it into `train_step(state, frozen, batch, key) -> (state, metrics)`. The stage jits that
function once:

    step = jax.jit(make_train_step(algorithm, optimizer), donate_argnames="state")

Shape letters: N samples of one rollout, E epochs, U updates, M micro-batches.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax import trees
from uae_jax.training.guard import outlier_metrics

PyTree = Any
Metrics = dict[str, jax.Array | tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """Everything a stage changes: donated to the step, sharded, checkpointed.

    Attributes:
      step: int32 [], calls of `train_step` so far.
      updates: int32 [], optimizer updates applied so far.
      skipped: int32 [], optimizer updates skipped so far because a gradient was not finite.
      params: trainable parameters only.
      opt_state: optax state of `params`.
      ema: moving average of `params`, or None when it is switched off.
    """

    step: jax.Array
    updates: jax.Array
    skipped: jax.Array
    params: PyTree
    opt_state: PyTree
    ema: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What a stage teaches the step.

    Attributes:
      rollout: `(params, frozen, batch, key) -> {"samples": tree, "shared": tree, "metrics": dict}`. Every leaf of
        `samples` is `[N, ...]` with the same N and is split into updates and micro-batches. `shared` (optional) is
        handed whole to every call of `loss`: schedules, scalars. `metrics` (optional) is logged. No gradient flows
          through any of it.
      loss: `(params, frozen, rollout, key) -> (sum, count, metrics)`, `rollout` being a slice `{"samples", "shared"}`.
        The objective is sum / count over the whole update; `count` carries no gradient. All micro-batches of an update
        get the same `key`: fold in the sample's id, and the result does not depend on how the samples are cut.

    A metric is a scalar, or a pair (sum, count) of scalars that is added up before it is divided.
    """

    rollout: Callable[[PyTree, PyTree, PyTree, jax.Array], dict[str, PyTree]]
    loss: Callable[[PyTree, PyTree, dict[str, PyTree], jax.Array], tuple[jax.Array, jax.Array, Metrics]]


def supervised(loss: Callable) -> Algorithm:
    """The algorithm without sampling: the rollout is the batch itself, every leaf of it `[N, ...]`."""
    return Algorithm(rollout=lambda params, frozen, batch, key: {"samples": batch}, loss=loss)


def init_state(params: PyTree, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """State at step 0. Parameters are copied: donating the state must not delete the caller's arrays, nor alias the
    average.
    """

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    params = jax.tree.map(jnp.copy, params)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(zero(), zero(), zero(), params, optimizer.init(params), average)


def step_key(root: jax.Array, name: str, step: jax.Array | int) -> jax.Array:
    """Key of the stream `name` at `step`: fold_in(fold_in(root, crc32(name)), step)."""
    return jax.random.fold_in(trees.name_key(root, name), step)


def ema_decay_at(updates: jax.Array, decay: float) -> jax.Array:
    """float32 []: min(decay, (1 + k) / (10 + k)), k = optimizer updates applied before this one (the warm-up of
    Flow-GRPO).
    """
    k = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1.0 + k) / (10.0 + k))


def split_samples(samples: PyTree, parts: int, group_size: int = 1) -> PyTree:
    """The samples of a rollout as `trees.cut` cuts them.

    Raises:
      ValueError: N is no multiple of parts * group_size, or the leaves disagree on N.
    """
    sizes = sorted({leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(samples)})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(
            f"rollout samples need one common leading axis, found lengths {sizes}; put scalars and tables in 'shared'"
        )
    if sizes[0] % (parts * group_size):
        raise ValueError(
            f"{sizes[0]} samples of a rollout do not divide into {parts} parts of whole groups of {group_size}; "
            "change the batch "
            "size, updates_per_rollout or micro_batches"
        )
    return trees.cut(samples, parts, group_size)


def accumulate_gradients(
    algorithm: Algorithm,
    params: PyTree,
    frozen: PyTree,
    rollout: dict[str, PyTree],
    key: jax.Array,
    micro_batches: int = 1,
) -> tuple[PyTree, jax.Array, jax.Array, Metrics]:
    """Gradient of sum / count over one update, a micro-batch at a time: (sum of gradients) / (sum of counts).

    Returns:
      gradients like `params`; loss sum []; count []; metrics as (sum, count) pairs. The sums run over micro-batches.
    """

    def objective(params: PyTree, samples: PyTree) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        total, count, metrics = algorithm.loss(params, frozen, {"samples": samples, "shared": rollout["shared"]}, key)
        return total.astype(jnp.float32), (jax.lax.stop_gradient(count).astype(jnp.float32), _pairs(metrics))

    def micro_step(gradients: PyTree, samples: PyTree) -> tuple[PyTree, PyTree]:
        (total, (count, metrics)), new = jax.value_and_grad(objective, has_aux=True)(params, samples)
        gradients = jax.tree.map(lambda old, extra: old + extra.astype(jnp.float32), gradients, new)
        return gradients, (total, count, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    parts = split_samples(rollout["samples"], micro_batches)
    # Unrolled when there is one part: XLA's CPU backend runs convolutions inside loops on a single thread.
    gradients, stacked = jax.lax.scan(micro_step, zeros, parts, unroll=micro_batches == 1)
    total, count, metrics = jax.tree.map(lambda x: x.sum(0), stacked)
    scale = 1.0 / jnp.maximum(count, 1e-8)
    gradients = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), gradients, params)
    return gradients, total, count, metrics


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
    new = state.replace(params=params, opt_state=opt_state, ema=ema, updates=state.updates + 1)
    old = state.replace(skipped=state.skipped + 1)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), norm


def make_train_step(
    algorithm: Algorithm,
    optimizer: optax.GradientTransformation,
    *,
    updates_per_rollout: int = 1,
    micro_batches: int = 1,
    epochs: int = 1,
    group_size: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, PyTree, PyTree, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `train_step(state, frozen, batch, key) -> (state, metrics)`: a rollout, then epochs * updates_per_rollout
    updates.

    Args:
      algorithm: rollout and loss of the stage.
      optimizer: optax chain, clipping included.
      updates_per_rollout: optimizer updates in one pass over the rollout; update u takes the groups u, u + U, u + 2U,
        ...
      micro_batches: parts of one update whose gradients are summed; changes memory, not the result.
      epochs: passes over the rollout, each in the same order.
      group_size: consecutive samples that stay in one update (the group of GRPO).
      ema_decay: ceiling of the moving average's decay (`ema_decay_at`), applied once an update; None switches it off
        and needs `state.ema` None.

    The key is the stage's root key; the streams "rollout" and "loss" are folded by `state.step` inside, so the same
    state gives the same step after a restart. Metrics are float32 scalars: `loss` (mean over updates of sum / count),
    `grad_norm` (before clipping), `skipped_updates` and `outlier_updates` (totals so far), and the algorithm's, sum /
    count (0 where the count is 0).

    Raises:
      ValueError: at trace time, samples that do not divide, a metric name used twice, or an average that is missing.
    """

    def train_step(
        state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        if (ema_decay is None) != (state.ema is None):
            raise ValueError(
                "ema_decay and state.ema must both be set or both be None; pass ema=True to init_state to keep one"
            )
        rollout = algorithm.rollout(state.params, frozen, batch, step_key(key, "rollout", state.step))
        rollout = jax.lax.stop_gradient({"shared": {}, "metrics": {}, **rollout})
        loss_key = step_key(key, "loss", state.step)
        parts = split_samples(rollout["samples"], updates_per_rollout, group_size)

        def update(state: TrainState, index: jax.Array) -> tuple[TrainState, PyTree]:
            samples = jax.tree.map(lambda x: x[index % updates_per_rollout], parts)
            gradients, total, count, metrics = accumulate_gradients(
                algorithm,
                state.params,
                frozen,
                {"samples": samples, "shared": rollout["shared"]},
                jax.random.fold_in(loss_key, index),
                micro_batches,
            )
            loss = total / jnp.maximum(count, 1e-8)
            state, norm = apply_gradients(state, gradients, loss, optimizer, ema_decay)
            return state, (loss, norm, metrics)

        updates = epochs * updates_per_rollout
        state, (losses, norms, stacked) = jax.lax.scan(update, state, jnp.arange(updates), unroll=updates == 1)
        own = {
            "loss": losses.mean(),
            "grad_norm": norms.mean(),
            "skipped_updates": state.skipped,
            **outlier_metrics(state.opt_state),
        }
        metrics = _join(own, rollout["metrics"], jax.tree.map(lambda x: x.sum(0), stacked))
        return state.replace(step=state.step + 1), metrics

    return train_step


def _pairs(metrics: Metrics) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every metric as a float32 (sum, count) pair without gradient."""

    def pair(value: Any) -> tuple[jax.Array, jax.Array]:
        total, count = value if isinstance(value, tuple) else (value, 1.0)
        return jnp.asarray(total, jnp.float32), jnp.asarray(count, jnp.float32)

    return jax.lax.stop_gradient({name: pair(value) for name, value in metrics.items()})


def _join(*groups: Metrics) -> dict[str, jax.Array]:
    """Merges metric dicts into float32 means. Raises ValueError when two of them use one name."""
    merged: dict[str, jax.Array] = {}
    for group in groups:
        twice = sorted(merged.keys() & group.keys())
        if twice:
            raise ValueError(f"metric {twice[0]!r} is reported twice; rename it in the rollout or in the loss")
        for name, (total, count) in _pairs(group).items():
            merged[name] = jnp.where(count > 0, total / jnp.maximum(count, 1e-8), 0.0)
    return merged
