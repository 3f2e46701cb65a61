import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import jit_as_users_do

from uae_jax.diffusion import sampler
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.diffusion.steps import CpsStep, DanceStep, EulerStep, SdeStep

SIGMAS = jnp.asarray(sigma_schedule(6))
BATCH, SHAPE = 4, (3, 5)


def _params(seed=0):
    a, b = jax.random.normal(jax.random.key(seed), (2, 5, 5)) * 0.3
    return {"in": a, "out": b}


def _denoiser(params):
    """A toy denoiser: velocity_fn(x [M, 3, 5], sigma [M], context [M, 5])."""

    def velocity_fn(x, sigma, context):
        hidden = jnp.tanh(x @ params["in"] + sigma[:, None, None] + context[:, None])
        return x + hidden @ params["out"]

    return velocity_fn


def _predict(params, context=None, **guidance):
    context = jnp.zeros((BATCH, 5)) if context is None else context
    return lambda x, sigma: sampler.guided_velocity(_denoiser(params), x, sigma, context, **guidance)


def _noise(batch=BATCH):
    return jax.random.normal(jax.random.key(5), (batch, *SHAPE))


def _keys(batch=BATCH, seed=9):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))


def test_sample_is_the_euler_recursion():
    predict = _predict(_params())
    x = _noise()
    for sigma, after in zip(SIGMAS[:-1], SIGMAS[1:]):
        x = x + (after - sigma) * predict(x, sigma)
    np.testing.assert_allclose(sampler.sample(predict, _noise(), SIGMAS), x, atol=1e-5)


def test_constant_velocity_is_integrated_exactly():
    x = sampler.sample(lambda x, s: jnp.full_like(x, 2.0), _noise(), SIGMAS)
    np.testing.assert_allclose(x, _noise() - 2.0, atol=1e-6)


def test_gradient_through_sampling_against_finite_differences():
    """d loss / d context through 3 guided steps, by central differences."""
    params, sigmas = _params(), jnp.asarray(sigma_schedule(3))
    context = jax.random.normal(jax.random.key(2), (BATCH, 5))
    direction = jax.random.normal(jax.random.key(3), (BATCH, 5))
    negative = jnp.ones((1, 5))

    def loss(scale, remat):
        predict = _predict(params, context + scale * direction, negative_context=negative, guidance_scale=5.0)
        return (sampler.sample(predict, _noise(), sigmas, remat=remat) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    gradient, step = value_and_grad(0.0, False)[1], 1e-2
    difference = (value_and_grad(step, False)[0] - value_and_grad(-step, False)[0]) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=5e-3)
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(value_and_grad(0.0, True)[1], gradient, rtol=1e-5)


def test_remat_does_not_change_gradients():
    def loss(params, remat):
        return (sampler.sample(_predict(params), _noise(), SIGMAS, remat=remat) ** 2).mean()

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(_params(), r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_gradient_steps_keep_the_value_and_cut_the_gradient():
    def loss(params, kept):
        return (sampler.sample(_predict(params), _noise(), SIGMAS, gradient_steps=kept) ** 2).mean()

    def last_two(params):
        early = sampler.sample(_predict(_params()), _noise(), SIGMAS[:-2])
        return (sampler.sample(_predict(params), early, SIGMAS[-3:]) ** 2).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, cut), (full_value, full) = (value_and_grad(_params(), kept) for kept in (2, None))
    expected = jax.jit(jax.grad(last_two))(_params())
    np.testing.assert_allclose(value, full_value, rtol=1e-6)
    np.testing.assert_allclose(cut["out"], expected["out"], rtol=1e-4, atol=1e-6)
    assert np.abs(cut["out"] - full["out"]).max() > 1e-3
    of_noise = jax.grad(lambda n: sampler.sample(_predict(_params()), n, SIGMAS, gradient_steps=2).sum())
    assert not np.any(jax.jit(of_noise)(_noise()))
    with pytest.raises(ValueError, match="gradient_steps"):
        loss(_params(), 7)


def test_guidance_one_skips_the_negative_half_and_equals_the_condition():
    seen = []

    def velocity_fn(x, sigma, context):
        seen.append(x.shape[0])
        return _denoiser(_params())(x, sigma, context)

    context = jax.random.normal(jax.random.key(2), (BATCH, 5))
    args = (velocity_fn, _noise(), jnp.float32(0.5), context, jnp.ones((1, 5)))
    plain = sampler.guided_velocity(*args, guidance_scale=1.0)
    guided = sampler.guided_velocity(*args, guidance_scale=1.0 + 1e-7)
    assert seen == [BATCH, 2 * BATCH]
    np.testing.assert_allclose(plain, guided, atol=1e-5)


@pytest.mark.trap(23)
def test_guidance_formula_and_order():
    contexts = {}

    def velocity_fn(x, sigma, context):
        contexts["seen"] = context
        return _denoiser(_params())(x, sigma, context["text"])

    positive = jax.random.normal(jax.random.key(2), (BATCH, 5))
    negative = jnp.full((1, 5), -1.0)
    level = jnp.float32(0.5)
    velocity = sampler.guided_velocity(velocity_fn, _noise(), level, {"text": positive}, {"text": negative}, 4.5)
    np.testing.assert_array_equal(contexts["seen"]["text"][::2], jnp.repeat(negative, BATCH, 0))
    np.testing.assert_array_equal(contexts["seen"]["text"][1::2], positive)
    sigma = jnp.full(BATCH, 0.5)
    v = _denoiser(_params())(_noise(), sigma, positive)
    u = _denoiser(_params())(_noise(), sigma, jnp.repeat(negative, BATCH, 0))
    np.testing.assert_allclose(velocity, u + 4.5 * (v - u), atol=1e-5)


def test_stopping_the_negative_gradient_changes_the_gradient_only():
    context = jax.random.normal(jax.random.key(2), (BATCH, 5))

    def loss(params, stop):
        negative, level = jnp.ones((1, 5)), jnp.float32(0.5)
        velocity = sampler.guided_velocity(_denoiser(params), _noise(), level, context, negative, 4.5, stop)
        return (velocity**2).sum()

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (a, grad_a), (b, grad_b) = (value_and_grad(_params(), stop) for stop in (False, True))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert np.abs(grad_a["out"] - grad_b["out"]).max() > 1e-2


def test_guidance_errors():
    context = jnp.zeros((BATCH, 5))
    with pytest.raises(ValueError, match="negative context"):
        sampler.guided_velocity(_denoiser(_params()), _noise(), jnp.float32(0.5), context, None, 4.5)
    with pytest.raises(ValueError, match="pad both"):
        negative = jnp.zeros((BATCH, 4))
        sampler.guided_velocity(_denoiser(_params()), _noise(), jnp.float32(0.5), context, negative, 4.5)


@pytest.mark.trap(21)
@pytest.mark.parametrize(
    "rule,start,size",
    [(SdeStep(0.7), 0, 5), (SdeStep(0.7), 3, 2), (DanceStep(0.3), 1, 2), (CpsStep(0.7), 1, 2)],
)
def test_replay_equals_the_rollout_bit_for_bit(rule, start, size):
    negative = jnp.ones((1, 5))
    context = jax.random.normal(jax.random.key(2), (BATCH, 5))

    def predict(params):
        return _predict(params, context, negative_context=negative, guidance_scale=4.5)

    @jit_as_users_do
    def rollout(params, start):
        return sampler.sample_window(predict(params), _noise(), SIGMAS, rule, start, size, _keys())

    @jit_as_users_do
    def replay(params, trajectory):
        return sampler.replay_window(predict(params), *trajectory[:2], trajectory.sigma_indices, SIGMAS, rule)

    trajectory = rollout(_params(), start)
    assert trajectory.latents.shape == (size, BATCH, *SHAPE)
    assert trajectory.latents.dtype == jnp.float32
    np.testing.assert_array_equal(trajectory.sigma_indices, start + np.arange(size))
    np.testing.assert_array_equal(trajectory.latents[1:], trajectory.next_latents[:-1])
    scored = replay(_params(), trajectory)
    np.testing.assert_array_equal(scored.log_probs, trajectory.log_probs)
    assert scored.stds.shape == scored.dts.shape == (size,) and (scored.dts < 0).all()
    moved = replay(jax.tree.map(lambda p: p * 1.1, _params()), trajectory)
    assert (moved.log_probs != trajectory.log_probs).all()


def test_the_window_is_stochastic_and_the_rest_is_the_ode():
    predict, start, size = _predict(_params()), 2, 2
    trajectory = sampler.sample_window(predict, _noise(), SIGMAS, SdeStep(0.7), start, size, _keys())
    before = sampler.sample(predict, _noise(), SIGMAS[: start + 1])
    np.testing.assert_allclose(trajectory.latents[0], before, atol=1e-5)
    after = sampler.sample(predict, trajectory.next_latents[-1], SIGMAS[start + size :])
    np.testing.assert_allclose(trajectory.final, after, atol=1e-5)
    euler, _ = EulerStep().transition(before, predict(before, SIGMAS[2]), SIGMAS[2], SIGMAS[3], SIGMAS[1])
    assert np.abs(trajectory.next_latents[0] - euler).max() > 0.1


def test_a_noiseless_window_is_the_deterministic_sampler():
    predict = _predict(_params())
    trajectory = sampler.sample_window(predict, _noise(), SIGMAS, SdeStep(0.0), 0, 5, _keys())
    expected = sampler.sample(predict, _noise(), SIGMAS)
    np.testing.assert_allclose(trajectory.final, expected, atol=1e-5)
    assert (trajectory.log_probs == 0).all()


@pytest.mark.trap(24)
def test_noise_belongs_to_samples_and_steps():
    """The same draws in any batch; none shared by two samples or two steps."""

    def latents(rows):
        predict = _predict(_params(), jnp.zeros((len(rows), 5)))
        noise = _noise()[jnp.array(rows)]
        return sampler.sample_window(predict, noise, SIGMAS, SdeStep(0.7), 0, 5, _keys()[jnp.array(rows)])

    whole, half = latents([0, 1, 2, 3]), latents([3, 1])
    np.testing.assert_allclose(half.next_latents, whole.next_latents[:, [3, 1]], atol=1e-5)
    # An image of zeros and full noise: the next latent is sigma times the draw.
    pure = sampler.sample_window(lambda x, s: x / s, jnp.zeros((BATCH, *SHAPE)), SIGMAS, CpsStep(1.0), 0, 5, _keys())
    draws = np.asarray(pure.next_latents / SIGMAS[1:6, None, None, None]).reshape(20, -1)
    overlap = np.abs(np.corrcoef(draws)) - np.eye(20)
    assert overlap.max() < 0.95
    other = sampler.sample_window(_predict(_params()), _noise(), SIGMAS, SdeStep(0.7), 0, 5, _keys(seed=10))
    assert (other.next_latents != whole.next_latents).all()


@pytest.mark.trap(37)
def test_one_program_serves_every_window():
    @jax.jit
    def rollout(start):
        return sampler.sample_window(_predict(_params()), _noise(), SIGMAS, SdeStep(0.7), start, 2, _keys())

    finals = [rollout(jnp.int32(start)).final for start in range(4)]
    assert rollout._cache_size() == 1
    assert all((a != b).any() for a, b in zip(finals, finals[1:]))


@pytest.mark.trap(22)
def test_deterministic_steps_leave_no_nan_in_gradients():
    """Scoring a window that a zero-noise rule made: finite value, zero gradient."""
    trajectory = sampler.sample_window(_predict(_params()), _noise(), SIGMAS, SdeStep(0.0), 0, 5, _keys())

    def loss(params):
        scored = sampler.replay_window(
            _predict(params), *trajectory[:2], trajectory.sigma_indices, SIGMAS, SdeStep(0.0)
        )
        return scored.log_probs.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(_params())
    assert value == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_replay_gradient_is_the_score_function():
    rule = SdeStep(0.7)
    trajectory = sampler.sample_window(_predict(_params()), _noise(), SIGMAS, rule, 1, 2, _keys())

    def log_prob(scale):
        params = jax.tree.map(lambda p: p * scale, _params())
        scored = sampler.replay_window(_predict(params), *trajectory[:2], trajectory.sigma_indices, SIGMAS, rule)
        return scored.log_probs.sum()

    value_and_grad = jax.jit(jax.value_and_grad(log_prob))
    difference = (value_and_grad(1.01)[0] - value_and_grad(0.99)[0]) / 0.02
    np.testing.assert_allclose(value_and_grad(1.0)[1], difference, rtol=2e-2, atol=1e-3)


def test_window_start_covers_the_range():
    keys = jax.random.split(jax.random.key(0), 200)
    starts = jax.vmap(lambda key: sampler.window_start(key, 1, 5, 2))(keys)
    assert set(np.asarray(starts).tolist()) == {1, 2, 3}
    with pytest.raises(ValueError, match="does not fit"):
        sampler.window_start(keys[0], 0, 2, 3)


def test_windows_that_do_not_fit_are_refused():
    args = (_predict(_params()), _noise(), SIGMAS, SdeStep(0.7))
    with pytest.raises(ValueError, match="1 to 5"):
        sampler.sample_window(*args, 0, 6, _keys())
    with pytest.raises(ValueError, match="from step 4"):
        sampler.sample_window(*args, 4, 2, _keys())
