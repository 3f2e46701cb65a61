"""Sampling tokens from logits with one uniform number a row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 512  # entries of the vocabulary summed together; two short running sums keep float32 accuracy
EXCLUDED = -1e30


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are sampled.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: keep only so many tokens; 0 keeps all. Inference only.
      top_p: keep the most probable tokens whose probabilities reach this sum; 1 keeps all. Inference only.
      banned: ranges (first, end) of tokens that are never sampled.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    banned: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        """Raises ValueError for values out of range."""
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, not {self}")

    def for_training(self) -> "SamplingConfig":
        """Itself, if its samples follow the distribution that `completion_log_probs` scores.

        Banned tokens are left out of samples and not of scores; a captioner gives them next to no probability.

        Raises:
          ValueError: the support is truncated or the temperature is 0, which would bias the policy gradient.
        """
        if self.top_k or self.top_p < 1 or self.temperature == 0:
            raise ValueError(f"a rollout for training needs temperature > 0, top_k 0 and top_p 1, not {self}")
        return self


def truncate(logits: Float[Array, "n v"], sampling: SamplingConfig) -> Float[Array, "n v"]:
    """Excludes banned tokens, and those outside top_k and top_p; top_p sees the tempered distribution."""
    tokens = jnp.arange(logits.shape[-1])
    for first, end in sampling.banned:
        logits = jnp.where((tokens >= first) & (tokens < end), EXCLUDED, logits)
    if sampling.top_k:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0]
        logits = jnp.where(logits >= kept[:, -1:], logits, EXCLUDED)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        probabilities = jax.nn.softmax(ordered / (sampling.temperature or 1.0), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest, logits, EXCLUDED)
    return logits


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
    # The first entry whose running sum passes the target, and the sum before it. Rounding can put the target at the
    # total: then the last entry with any weight is taken, never one of probability zero.
    running = jnp.cumsum(weights, axis=-1)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(jnp.sum(running <= target[:, None], axis=-1), last)
    before = jnp.where(index > 0, jnp.take_along_axis(running, jnp.maximum(index - 1, 0)[:, None], axis=-1)[:, 0], 0.0)
    return index, before


def sample_tokens(
    logits: Float[Array, "n v"], uniforms: Float[Array, " n"], temperature: float = 1.0
) -> Int[Array, " n"]:
    """Samples from `softmax(logits / temperature)` by the inverse of its distribution function.

    Args:
      logits: float32.
      uniforms: in [0, 1).
      temperature: 0 takes the largest logit.

    Returns:
      int32 tokens.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    rows, vocabulary = logits.shape
    tempered = logits.astype(jnp.float32) / temperature
    weights = jnp.exp(tempered - jnp.max(tempered, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % BLOCK))).reshape(rows, -1, BLOCK)
    sums = jnp.sum(weights, axis=-1)
    target = uniforms * jnp.sum(sums, axis=-1)
    block, before = _first_above(sums, target)
    within = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    index, _ = _first_above(within, target - before)
    return (block * BLOCK + index).astype(jnp.int32)
