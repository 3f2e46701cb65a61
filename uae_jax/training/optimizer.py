"""Optimizer from a frozen config: clip, AdamW with masked decay, schedule, learning-rate factors by parameter path."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from uae_jax import trees

PyTree = Any

# Stacked layers give a bias two axes, so matrices are known by name: kernels, embeddings and the two adapter factors.
DECAYED = r"(^|/)(kernel|embedding|a|b)$"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW settings. Durations are optimizer updates, not train steps.

    Attributes:
      learning_rate: peak value, > 0.
      schedule: "constant", "cosine" or "linear" after the warm-up.
      warmup_steps: update k < warmup_steps uses (k + 1) / warmup_steps of the peak, so that no update is a no-op.
      final_fraction: share of the peak reached at the last update of "cosine" and "linear".
      b1, b2, eps: Adam's.
      weight_decay: decoupled decay of the leaves whose path matches `decayed`.
      decayed: regular expression, searched in "a/b/kernel" paths.
      max_grad_norm: global-norm clip, 0 = off.
      multipliers: (path pattern, factor) pairs on the learning rate; the first match counts, no match is 1.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decayed: str = DECAYED
    max_grad_norm: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"optimizer.schedule is {self.schedule!r}; use 'constant', 'cosine' or 'linear'")
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        if self.warmup_steps < 0 or self.max_grad_norm < 0 or self.weight_decay < 0:
            raise ValueError("optimizer.warmup_steps, max_grad_norm and weight_decay must be 0 or more")


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update k = 0, 1, ...: linear warm-up, then the named decay, which ends at update
    `total_updates`.

    Raises:
      ValueError: a decay with a warm-up as long as the run.
    """
    if config.schedule != "constant" and config.warmup_steps >= total_updates:
        raise ValueError(
            f"optimizer.warmup_steps is {config.warmup_steps} in a run of {total_updates} updates; shorten it, or "
            "use the "
            "constant schedule"
        )
    length = max(total_updates - config.warmup_steps, 1)

    def schedule(k: jax.Array) -> jax.Array:
        progress = jnp.clip((k - config.warmup_steps) / length, 0.0, 1.0)
        if config.schedule == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            factor = 1.0 - progress
        else:
            factor = jnp.ones_like(progress)
        if config.schedule != "constant":
            factor = config.final_fraction + (1.0 - config.final_fraction) * factor
        warmup = jnp.minimum((k + 1) / max(config.warmup_steps, 1), 1.0)
        return config.learning_rate * factor * warmup

    return schedule


def decay_mask(params: PyTree, pattern: str = DECAYED) -> PyTree:
    """True for the leaves that decay: path matches `pattern` and the leaf has two axes or more."""
    return trees.map_with_name(lambda name, leaf: leaf.ndim >= 2 and re.search(pattern, name) is not None, params)


def scale_by_path(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies updates by the factor of the first pattern found in the leaf's path, 1 without a match.

    Raises:
      ValueError: at init, a pattern that matches no parameter.
    """

    def factor(path: str) -> float:
        return next((value for pattern, value in multipliers if re.search(pattern, path)), 1.0)

    def init(params: PyTree) -> optax.EmptyState:
        paths = list(trees.flatten(params))
        for pattern, _ in multipliers:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"optimizer.multipliers: {pattern!r} matches no parameter; paths look like {paths[0]!r}"
                )
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        return trees.map_with_name(lambda name, leaf: leaf * factor(name), updates), state

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """The optax chain clip -> AdamW -> path factors of `config`, for a run of `total_updates` optimizer updates."""
    parts = []
    if config.max_grad_norm:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    parts.append(
        optax.adamw(
            make_schedule(config, total_updates),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: decay_mask(params, config.decayed),
        )
    )
    if config.multipliers:
        parts.append(scale_by_path(config.multipliers))
    return optax.chain(*parts)
