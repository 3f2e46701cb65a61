"""The image tokenizer of the built-in unified model: an auto-encoder of scenes with a codebook (arXiv 1711.00937).

Codes count by their direction. A gradient passes a code as if it were its vector. No state is kept for codes that are
never used: the entropy of the mean assignment is raised, and that of each assignment lowered, so that all of them are
used and each vector has one (as arXiv 2310.05737, equation 5).
"""

import jax
import jax.numpy as jnp
from jax import Array

from uae_jax.methods.method import Supervised
from uae_jax.models.janus import vq
from uae_jax.models.janus.config import VQConfig

COMMITMENT, ENTROPY, TEMPERATURE = 0.25, 0.05, 0.1


def algorithm(config: VQConfig) -> Supervised:
    """Squared and absolute error, commitment and entropies, on batches of `pixels` `[B, H, W, 3]`."""

    def loss(params: dict, frozen: dict, rollout: dict, key: Array) -> tuple[Array, Array, dict]:
        del frozen, key
        pixels = rollout["samples"]["pixels"]
        vectors = vq.unit(vq.features(config, params, pixels))
        table = vq.unit(params["codebook"]["table"])
        likeness = jnp.einsum("bhwd,nd->bhwn", vectors, table, precision="highest")
        nearest = jnp.argmax(likeness, axis=-1)
        codes = jnp.take(table, nearest, axis=0)
        passed = vectors + jax.lax.stop_gradient(codes - vectors)
        decoded = vq.decode_codes(config, params, passed)
        squared = jnp.mean(jnp.square(decoded - pixels), (1, 2, 3))
        absolute = jnp.mean(jnp.abs(decoded - pixels), (1, 2, 3))
        held = jnp.mean(jnp.square(vectors - jax.lax.stop_gradient(codes)), (1, 2, 3))
        moved = jnp.mean(jnp.square(jax.lax.stop_gradient(vectors) - codes), (1, 2, 3))
        share = jax.nn.softmax(likeness / TEMPERATURE, axis=-1).reshape(-1, config.codes)
        spread = _entropy(share.mean(0)) - _entropy(share).mean()
        count = jnp.float32(len(pixels))
        total = jnp.sum(squared + 0.2 * absolute + moved + COMMITMENT * held) - count * ENTROPY * spread
        used = jnp.zeros(config.codes).at[nearest.reshape(-1)].add(1.0) / nearest.size
        metrics = {
            "squared_error": (squared.sum(), count),
            "code_distance": (held.sum(), count),
            "perplexity": (jnp.exp(_entropy(used)), 1.0),
        }
        return total, count, metrics

    return Supervised(loss)


def _entropy(share: Array) -> Array:
    """Entropy of distributions along the last axis, in nats."""
    return -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-8)), axis=-1)
