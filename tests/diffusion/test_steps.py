import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from uae_jax.diffusion import steps
from uae_jax.diffusion.schedule import KINDS, sigma_schedule

SIGMAS = jnp.asarray(sigma_schedule(10))
RULES = [steps.SdeStep(0.7), steps.DanceStep(0.3), steps.CpsStep(0.7)]


def _state(seed=0, shape=(3, 4, 4, 2)):
    return jax.random.normal(jax.random.key(seed), (2, *shape))


def _transition(rule, x, v, index, sigmas=SIGMAS):
    return rule.transition(x, v, sigmas[index], sigmas[index + 1], sigmas[1])


@pytest.mark.trap(17)
@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("rule", [steps.SdeStep(0.0), steps.DanceStep(0.0), steps.CpsStep(0.0)])
def test_without_noise_every_rule_is_euler(rule, index):
    x, v = _state()
    mean, std = _transition(rule, x, v, index)
    euler, _ = _transition(steps.EulerStep(), x, v, index)
    assert std == 0
    np.testing.assert_allclose(mean, euler, atol=2e-6)
    np.testing.assert_allclose(euler, x + (SIGMAS[index + 1] - SIGMAS[index]) * v, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_first_sde_step_has_std_equal_to_the_noise_level(kind, noise_level):
    sigmas = jnp.asarray(sigma_schedule(10, 3.0, kind))
    x, v = _state()
    mean, std = _transition(steps.SdeStep(noise_level), x, v, 0, sigmas)
    assert std == np.float32(noise_level)
    expected = x * (1 - noise_level**2 / 2) + v * (sigmas[1] - sigmas[0])
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_sde_coefficients_at_ten_steps():
    stds = [0.7, 0.7430, 0.5362, 0.4459, 0.3918, 0.3528, 0.3191, 0.2820, 0.2254, 0.0063]
    slopes = [-0.0399, -0.0582, -0.0693, -0.0838, -0.1034, -0.1309, -0.1709, -0.2326, -0.3351]
    slopes += [-0.0111]
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    for index in range(10):
        mean, std = _transition(steps.SdeStep(0.7), zero, one, index)
        np.testing.assert_allclose(std, stds[index], atol=6e-5)
        np.testing.assert_allclose(mean[0, 0], slopes[index], atol=6e-5)


@pytest.mark.trap(17)
@pytest.mark.parametrize("index", range(1, 10))
@pytest.mark.parametrize("rule", RULES[:2])
def test_sde_mean_is_the_reverse_sde_with_the_score(rule, index):
    """dx = [v - g^2 / 2 score] dt + g dw backwards, score = -(x + (1 - s) v) / s."""
    x, v = (np.asarray(a, np.float64) for a in _state())
    s, dt = float(SIGMAS[index]), float(SIGMAS[index + 1]) - float(SIGMAS[index])
    g = 0.3 if isinstance(rule, steps.DanceStep) else 0.7 * math.sqrt(s / (1 - s))
    score = -(x + (1 - s) * v) / s
    mean, std = _transition(rule, jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32), index)
    np.testing.assert_allclose(mean, x + (v - g**2 / 2 * score) * dt, atol=3e-6)
    np.testing.assert_allclose(std, g * math.sqrt(-dt), rtol=1e-5)


def test_cps_keeps_the_noise_coefficient():
    x0, noise = _state()
    s, after = SIGMAS[4], SIGMAS[5]
    x, v = (1 - s) * x0 + s * noise, noise - x0
    mean, std = _transition(steps.CpsStep(0.7), x, v, 4)
    np.testing.assert_allclose(std, after * math.sin(0.35 * math.pi), rtol=1e-6)
    expected = (1 - after) * x0 + jnp.sqrt(after**2 - std**2) * noise
    np.testing.assert_allclose(mean, expected, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_inputs_are_computed_in_float32(rule):
    x, v = _state()
    x, v = x.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    mean, std = jax.jit(lambda s: rule.transition(x, v, s, SIGMAS[4], SIGMAS[1]))(SIGMAS[3])
    exact, _ = rule.transition(x.astype(jnp.float32), v.astype(jnp.float32), SIGMAS[3], SIGMAS[4], SIGMAS[1])
    assert mean.dtype == std.dtype == jnp.float32
    np.testing.assert_allclose(mean, exact, atol=1e-6)
    assert np.isfinite(std) and std > 0


@pytest.mark.trap(18)
def test_log_prob_is_the_mean_of_normal_log_densities():
    mean, x_next = _state()
    log_prob = steps.transition_log_prob(x_next, mean, jnp.float32(0.4))
    density = stats.norm.logpdf(np.asarray(x_next), np.asarray(mean), 0.4)
    np.testing.assert_allclose(log_prob, density.mean(axis=(1, 2, 3)), rtol=1e-5)
    joint = stats.multivariate_normal.logpdf(
        np.asarray(x_next[0]).ravel(), np.asarray(mean[0]).ravel(), 0.16 * np.eye(32)
    )
    np.testing.assert_allclose(log_prob[0] * 32, joint, rtol=1e-4)


@pytest.mark.trap(18)
@pytest.mark.parametrize("score", [steps.transition_log_prob, steps.cps_log_prob])
def test_the_sample_is_a_constant_and_the_mean_is_not(score):
    mean, x_next = _state()

    def total(x_next, mean):
        return score(x_next, mean, jnp.float32(0.4)).sum()

    by_sample, by_mean = jax.grad(total, argnums=(0, 1))(x_next, mean)
    assert (by_sample == 0).all()
    factor = 1 / 0.4**2 if score is steps.transition_log_prob else 2
    np.testing.assert_allclose(by_mean, factor * (x_next - mean) / 32, rtol=1e-4, atol=1e-7)


def test_cps_log_prob_has_no_variance_and_no_constants():
    mean, x_next = _state()
    rule = steps.CpsStep(0.7)
    log_prob = steps.step_log_prob(rule, x_next, mean, jnp.float32(0.4))
    np.testing.assert_allclose(log_prob, -((x_next - mean) ** 2).mean(axis=(1, 2, 3)), rtol=1e-6)
    gaussian = steps.step_log_prob(steps.SdeStep(), x_next, mean, jnp.float32(0.4))
    np.testing.assert_array_equal(gaussian, steps.transition_log_prob(x_next, mean, jnp.float32(0.4)))


@pytest.mark.trap(22)
@pytest.mark.parametrize("score", [steps.transition_log_prob, steps.cps_log_prob])
def test_deterministic_steps_have_no_log_prob_and_no_nan(score):
    mean, x_next = _state()
    gradient = jax.grad(lambda m, std: score(x_next, m, std).sum())
    assert (score(x_next, mean, jnp.float32(0)) == 0).all() and (gradient(mean, jnp.float32(0)) == 0).all()
    assert (score(x_next, mean, jnp.float32(0.4)) != 0).all() and (gradient(mean, jnp.float32(0.4)) != 0).any()


@pytest.mark.trap(19)
@pytest.mark.parametrize("dimensions", [64, 1024])
def test_ratio_statistics(dimensions):
    """log rho has mean -k and std sqrt(2 k / D) when the mean moves by a KL of k a dimension."""
    samples, index, rule = 4000, 3, steps.SdeStep(0.7)
    x, v = _state(shape=(samples, dimensions))
    mean, std = _transition(rule, x, v, index)
    x_next = steps.sample_transition(jax.random.split(jax.random.key(7), samples), mean, std)
    shift = 0.02 * jax.random.normal(jax.random.key(8), (1, dimensions))
    moved, _ = _transition(rule, x, v + shift, index)
    k = float(steps.gaussian_kl(moved, mean, std)[0])
    log_ratio = steps.step_log_prob(rule, x_next, moved, std) - steps.step_log_prob(rule, x_next, mean, std)
    expected_std = math.sqrt(2 * k / dimensions)
    assert abs(float(log_ratio.mean()) + k) < 4 * expected_std / math.sqrt(samples)
    assert abs(float(log_ratio.std()) / expected_std - 1) < 4 / math.sqrt(2 * samples)


@pytest.mark.trap(20)
@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.0])
def test_sde_keeps_the_marginals_of_gaussian_data(noise_level):
    data_std, count, dimensions, total = 0.4, 1000, 50, 200
    sigmas = jnp.asarray(sigma_schedule(total, shift=1.0))
    rule = steps.SdeStep(noise_level)

    def step(x, inputs):
        key, sigma, after = inputs
        variance = (1 - sigma) ** 2 * data_std**2 + sigma**2
        v = (sigma - (1 - sigma) * data_std**2) / variance * x
        mean, std = rule.transition(x, v, sigma, after, sigmas[1])
        return steps.sample_transition(jax.random.split(key, count), mean, std), None

    keys = jax.random.split(jax.random.key(3), total)
    x = jax.random.normal(jax.random.key(4), (count, dimensions))
    x, _ = jax.lax.scan(step, x, (keys, sigmas[:-1], sigmas[1:]))
    assert abs(float(x.std()) / data_std - 1) < 0.02


@pytest.mark.trap(27)
def test_kl_forms_against_hand_values():
    ref, difference = _state()
    std, dt = jnp.float32(0.5), jnp.float32(-0.04)
    square = (difference**2).mean(axis=(1, 2, 3))
    exact = steps.gaussian_kl(ref + difference, ref, std)
    np.testing.assert_allclose(exact, square / (2 * 0.25), rtol=1e-5)
    divergence = [np.log(1) + (0.25 + d**2) / (2 * 0.25) - 0.5 for d in np.asarray(difference)]
    np.testing.assert_allclose(exact, np.mean(divergence, axis=(1, 2, 3)), rtol=1e-4)
    g2 = 0.25 / 0.04
    nodt = steps.gaussian_kl(ref + difference, ref, std, "gaussian_nodt", dt=dt)
    np.testing.assert_allclose(nodt, square / (2 * g2), rtol=1e-5)
    velocity = steps.gaussian_kl(ref, ref, std, "velocity", velocity=ref + difference, velocity_ref=ref)
    np.testing.assert_allclose(velocity, square, rtol=1e-5)


@pytest.mark.trap(27)
def test_kl_of_a_velocity_change_has_a_gradient_and_vanishes_at_the_reference():
    rule = steps.SdeStep(0.7)
    x, v = _state()
    reference, std = _transition(rule, x, v, 2)

    def kl(scale):
        return steps.gaussian_kl(_transition(rule, x, scale * v, 2)[0], reference, std).sum()

    assert kl(1.0) == 0 and jax.grad(kl)(1.0) == 0
    assert kl(1.1) > 0 and jax.grad(kl)(1.1) > 0
    assert (steps.gaussian_kl(x, v, jnp.float32(0)) == 0).all()


def test_kl_refuses_what_it_cannot_compute():
    x, v = _state()
    with pytest.raises(ValueError, match="jeffreys"):
        steps.gaussian_kl(x, v, jnp.float32(1), "jeffreys")
    with pytest.raises(ValueError, match="dt"):
        steps.gaussian_kl(x, v, jnp.float32(1), "gaussian_nodt")
    with pytest.raises(ValueError, match="velocity_ref"):
        steps.gaussian_kl(x, v, jnp.float32(1), "velocity")
