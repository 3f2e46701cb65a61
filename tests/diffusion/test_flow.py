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


@pytest.mark.trap(32)
def test_corruption_and_velocity_are_inverses():
    x0, noise = _pair()
    sigma = jnp.array([0.1, 0.5, 0.9])
    x = flow.corrupt(x0, noise, sigma)
    velocity = flow.velocity_target(x0, noise)
    np.testing.assert_allclose(flow.predict_x0(x, velocity, sigma), x0, atol=1e-6)
    np.testing.assert_allclose(flow.predict_noise(x, velocity, sigma), noise, atol=1e-6)
    np.testing.assert_array_equal(flow.corrupt(x0, noise, jnp.float32(0)), x0)
    np.testing.assert_array_equal(flow.corrupt(x0, noise, jnp.float32(1)), noise)


@pytest.mark.trap(32)
def test_velocity_is_the_derivative_of_the_path():
    x0, noise = _pair()
    _, tangent = jax.jvp(lambda s: flow.corrupt(x0, noise, s), (jnp.float32(0.3),), (jnp.float32(1),))
    np.testing.assert_allclose(tangent, flow.velocity_target(x0, noise), atol=1e-6)


@pytest.mark.trap(32)
def test_the_loss_is_the_weighted_mean_squared_error_of_each_sample():
    x0, noise = _pair()
    target = flow.velocity_target(x0, noise)
    velocity = target + jax.random.normal(jax.random.key(2), target.shape)
    weight = jnp.array([0.5, 1.0, 2.0])
    error = ((np.asarray(velocity) - np.asarray(target)) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(flow.flow_matching_loss(velocity, target, weight), weight * error, rtol=1e-5)


@pytest.mark.trap(32)
def test_perfect_prediction_has_no_loss_and_the_loss_is_float32():
    x0, noise = _pair()
    target = flow.velocity_target(x0, noise)
    assert (flow.flow_matching_loss(target, target, jnp.ones(3)) == 0).all()
    loss = flow.flow_matching_loss(target.astype(jnp.bfloat16), target, jnp.ones(3))
    assert loss.dtype == jnp.float32 and loss.shape == (3,)


@pytest.mark.trap(32)
def test_weights():
    sigma = jnp.array([0.25, 0.5, 1.0])
    np.testing.assert_array_equal(flow.loss_weight(sigma), 1)
    np.testing.assert_allclose(flow.loss_weight(sigma, "sigma_sqrt"), [16, 4, 1])
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


@pytest.mark.trap(32)
@pytest.mark.parametrize("scheme", flow.SCHEMES)
def test_histogram_of_levels(scheme):
    shift = 3.0
    sigmas = np.asarray(flow.sample_sigmas(_keys(20000), scheme, shift), np.float64)
    assert (sigmas >= 0).all() and (sigmas <= 1).all()
    unshifted = sigmas / (shift - (shift - 1) * sigmas)
    inside = np.clip(unshifted, 1e-9, 1 - 1e-9)
    distance = stats.kstest(inside, _distribution(scheme)).statistic
    assert distance < 1.63 / np.sqrt(20000)


@pytest.mark.trap(32)
@pytest.mark.parametrize("scheme", flow.SCHEMES)
def test_strata_are_equally_probable_parts_of_the_density(scheme):
    """Each level lies in its own part, and all of them together have the density."""
    parts, keys = 4, _keys(5000)
    found = [
        np.asarray(flow.sample_sigmas(jax.vmap(jax.random.fold_in, (0, None))(keys, part), scheme, 1.0, (part, parts)))
        for part in range(parts)
    ]
    shares = [_distribution(scheme)(np.clip(sigmas.astype(np.float64), 1e-9, 1 - 1e-9)) for sigmas in found]
    lowest = sorted(share.min() for share in shares)
    for low, share in zip(lowest, sorted(shares, key=np.min)):
        assert low >= share.min() and share.max() - low <= 1 / parts + 1e-3
    np.testing.assert_allclose(lowest, np.arange(parts) / parts, atol=2e-3)
    assert stats.kstest(np.concatenate(shares), "uniform").statistic < 1.63 / np.sqrt(parts * 5000)


@pytest.mark.trap(32)
def test_levels_belong_to_samples_not_to_batches():
    keys = _keys(8)
    whole = flow.sample_sigmas(keys)
    np.testing.assert_array_equal(whole[4:], flow.sample_sigmas(keys[4:]))
    assert len(np.unique(whole)) == 8
    with pytest.raises(ValueError, match="beta"):
        flow.sample_sigmas(keys, "beta")
