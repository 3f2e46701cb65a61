import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from uae_jax.diffusion import flow


def _keys(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def _pair(shape=(3, 4, 4, 2)):
    x0, noise = jax.random.normal(jax.random.key(1), (2, *shape))
    return x0, noise


def test_corruption_and_velocity_are_inverses():
    x0, noise = _pair()
    sigma = jnp.array([0.1, 0.5, 0.9])
    x = flow.corrupt(x0, noise, sigma)
    velocity = flow.velocity_target(x0, noise)
    np.testing.assert_allclose(flow.predict_x0(x, velocity, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(flow.predict_noise(x, velocity, sigma), noise, atol=1e-6)
    np.testing.assert_array_equal(flow.corrupt(x0, noise, 0.0), x0)
    np.testing.assert_array_equal(flow.corrupt(x0, noise, 1.0), noise)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = _pair()
    _, tangent = jax.jvp(lambda s: flow.corrupt(x0, noise, s), (0.3,), (1.0,))
    np.testing.assert_allclose(tangent, flow.velocity_target(x0, noise), atol=1e-6)


def test_preconditioned_loss_is_the_image_space_loss():
    x0, noise = _pair()
    sigma = jnp.array([0.05, 0.5, 0.95])
    x, target = flow.corrupt(x0, noise, sigma), flow.velocity_target(x0, noise)
    velocity = target + jax.random.normal(jax.random.key(2), target.shape)
    image_error = ((flow.predict_x0(x, velocity, sigma) - x0) ** 2).mean(axis=(1, 2, 3))
    loss = flow.flow_matching_loss(velocity, target, flow.loss_weight(sigma, "none", precondition=True))
    np.testing.assert_allclose(loss, image_error, rtol=1e-4)
    plain = flow.flow_matching_loss(velocity, target)
    np.testing.assert_allclose(loss, sigma**2 * plain, rtol=1e-6)


def test_perfect_prediction_has_no_loss_and_the_loss_is_float32():
    x0, noise = _pair()
    target = flow.velocity_target(x0, noise)
    assert (flow.flow_matching_loss(target, target) == 0).all()
    loss = flow.flow_matching_loss(target.astype(jnp.bfloat16), target)
    assert loss.dtype == jnp.float32 and loss.shape == (3,)


def test_weights():
    sigma = jnp.array([0.25, 0.5, 1.0])
    np.testing.assert_array_equal(flow.loss_weight(sigma), 1)
    np.testing.assert_allclose(flow.loss_weight(sigma, "sigma_sqrt"), [16, 4, 1])
    np.testing.assert_allclose(flow.loss_weight(sigma, "sigma_sqrt", True), 1)
    expected = 2 / np.pi / np.array([0.625, 0.5, 1.0])
    np.testing.assert_allclose(flow.loss_weight(sigma, "cosmap"), expected, rtol=1e-6)
    assert np.isfinite(flow.loss_weight(jnp.zeros(1), "sigma_sqrt")).all()
    assert flow.loss_weight(sigma.astype(jnp.bfloat16), "cosmap").dtype == jnp.float32
    with pytest.raises(ValueError, match="snr"):
        flow.loss_weight(sigma, "snr")


def _distribution(scheme):
    """Cumulative distribution of the unshifted level."""
    grid = np.linspace(0, 1, 20001)
    mode = 1 - grid - 1.29 * (np.cos(np.pi * grid / 2) ** 2 - 1 + grid)
    return {
        "uniform": lambda s: s,
        "logit_normal": lambda s: stats.norm.cdf(np.log(s / (1 - s))),
        "mode": lambda s: np.interp(s, 1 - mode, grid),
        "cosmap": lambda s: 2 / np.pi * np.arctan(s / (1 - s)),
    }[scheme]


@pytest.mark.parametrize("scheme", flow.SCHEMES)
@pytest.mark.parametrize("table", [None, 1000])
def test_histogram_of_levels(scheme, table):
    shift = 3.0
    sigmas = np.asarray(flow.sample_sigmas(_keys(20000), scheme, shift, table=table), np.float64)
    assert (sigmas >= 0).all() and (sigmas <= 1).all()
    unshifted = sigmas / (shift - (shift - 1) * sigmas)
    inside = np.clip(unshifted, 1e-9, 1 - 1e-9)
    distance = stats.kstest(inside, _distribution(scheme)).statistic
    assert distance < 1.63 / np.sqrt(20000) + (0.002 if table else 0)


def test_table_levels_are_the_training_levels():
    sigmas = flow.sample_sigmas(_keys(500), shift=3.0, table=1000)
    levels = np.arange(1, 1001) / 1000
    levels = 3 * levels / (1 + 2 * levels)
    assert np.abs(np.asarray(sigmas)[:, None] - levels).min(axis=1).max() < 1e-6


def test_positive_logit_mean_moves_towards_the_image():
    keys = _keys(2000)
    assert flow.sample_sigmas(keys, logit_mean=1.0).mean() < flow.sample_sigmas(keys).mean() - 0.1


def test_levels_belong_to_samples_not_to_batches():
    keys = _keys(8)
    whole = flow.sample_sigmas(keys)
    np.testing.assert_array_equal(whole[4:], flow.sample_sigmas(keys[4:]))
    assert len(np.unique(whole)) == 8
    with pytest.raises(ValueError, match="beta"):
        flow.sample_sigmas(keys, "beta")
