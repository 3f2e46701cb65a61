"""Optimizer from a frozen config: clip, AdamW with masked decay, schedule, learning-rate factors by parameter path."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from uae_jax import trees
from uae_jax.settings import Settings, setting

PyTree = Any

# Stacked layers give a bias two axes, so matrices are known by name: kernels, embeddings and the two adapter factors.
DECAYED = r"(^|/)(kernel|embedding|a|b)$"


SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW settings. Durations are optimizer updates, not train steps."""

    learning_rate: float = setting(1e-4, "peak value", above=0)
    schedule: str = setting("constant", "after the warm-up", choices=SCHEDULES)
    warmup_steps: int = setting(0, "updates of the linear warm-up, shortened in a shorter run", unit="updates", low=0)
    final_fraction: float = setting(
        0.0, "share of the peak at the last update of cosine and linear schedules", low=0, high=1
    )
    b1: float = setting(0.9, "Adam's decay of the first moment", low=0, high=1)
    b2: float = setting(0.999, "Adam's decay of the second moment", low=0, high=1)
    eps: float = setting(1e-8, "Adam's denominator offset", low=0)
    weight_decay: float = setting(1e-4, "decoupled decay of the leaves that match decayed", low=0, source="flow_grpo")
    decayed: str = setting(DECAYED, "regular expression, searched in paths such as a/b/kernel")
    max_grad_norm: float = setting(1.0, "global-norm clip; 0 for none", low=0, source="flow_grpo")
    multipliers: tuple[tuple[str, float], ...] = setting(
        (), "(path pattern, factor) pairs on the learning rate; the first match counts"
    )

    def warmup_of(self, total_updates: int) -> int:
        """The updates of the warm-up: as configured, or half of a run that is not longer than that."""
        return self.warmup_steps if self.warmup_steps < total_updates else total_updates // 2


def make_schedule(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Learning rate of update k: linear warm-up, then the named decay, which ends at update `total_updates`.

    Update k of the warm-up has (k + 1) / warmup_steps of the peak, so that no update does nothing.
    """
    warmup_steps = config.warmup_of(total_updates)
    length = max(total_updates - warmup_steps, 1)

    def schedule(k: Any) -> jax.Array:
        progress = jnp.clip((k - warmup_steps) / length, 0.0, 1.0)
        if config.schedule == "cosine":
            factor = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif config.schedule == "linear":
            factor = 1.0 - progress
        else:
            factor = jnp.ones_like(progress)
        if config.schedule != "constant":
            factor = config.final_fraction + (1.0 - config.final_fraction) * factor
        warmup = jnp.minimum((k + 1) / max(warmup_steps, 1), 1.0)
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

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
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
