"""Cosine and noise scale of two halves, against gradients whose noise is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.rl.gradient_noise import noise_metrics

DIMENSIONS, SAMPLES, SIGNAL, NOISE = 400, 25, 0.5, 3.0  # |G|^2 = .25 a dimension times 400, tr S = 9 times 400


def halves(seed):
    mean = SIGNAL * np.sign(np.random.default_rng(0).normal(size=DIMENSIONS))
    noise = np.random.default_rng([1, seed]).normal(size=(2, SAMPLES, DIMENSIONS)).mean(1) * NOISE
    one, other = jnp.asarray(mean + noise, jnp.float32)
    return {"a": one[:100].reshape(10, 10), "b": one[100:]}, {"a": other[:100].reshape(10, 10), "b": other[100:]}


def value(pair):
    return float(pair[0]) / float(pair[1])


def test_the_noise_scale_is_that_of_the_samples():
    found = [noise_metrics(*halves(seed), SAMPLES) for seed in range(60)]
    joined = jax.tree.map(lambda *leaves: sum(map(float, leaves)), *found)
    assert value(joined["noise_scale"]) == pytest.approx(NOISE**2 / SIGNAL**2, rel=0.06)
    assert value(joined["gradient_signal"]) == pytest.approx(SIGNAL**2 * DIMENSIONS, rel=0.06)
    expected = SIGNAL**2 / (SIGNAL**2 + NOISE**2 / SAMPLES)
    assert value(joined["gradient_cosine"]) == pytest.approx(expected, abs=0.02)


def test_equal_halves_are_without_noise_and_opposite_ones_without_signal():
    one, _ = halves(0)
    same = noise_metrics(one, one, 8)
    assert value(same["gradient_cosine"]) == pytest.approx(1, abs=1e-6) and abs(value(same["noise_scale"])) < 1e-4
    against = noise_metrics(one, jax.tree.map(jnp.negative, one), 8)
    assert value(against["gradient_cosine"]) == pytest.approx(-1, abs=1e-6) and float(against["noise_scale"][1]) < 0
    nothing = noise_metrics(*(jax.tree.map(jnp.zeros_like, one),) * 2, 8)
    assert all(np.isfinite(float(number)) for pair in nothing.values() for number in pair)
