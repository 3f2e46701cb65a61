import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.diffusion import sampler
from uae_jax.diffusion.schedule import sigma_schedule
from uae_jax.diffusion.steps import SdeStep, gaussian_kl, sample_transition, transition_log_prob
from uae_jax.rl import losses
from uae_jax.rl.advantages import group_advantages

AGGREGATIONS = [
    {"aggregation": "grpo"},
    {"aggregation": "dr_grpo", "max_tokens": 12},
    {"aggregation": "token_mean"},
    {"aggregation": "gspo", "clip_low": 0.05, "clip_high": 0.05},
]


def _tokens(count=8, width=6, seed=0):
    """Unequal lengths, an off-policy ratio and a reference: (log_prob, the other arrays)."""
    keys = jax.random.split(jax.random.key(seed), 4)
    log_prob = -jax.random.uniform(keys[0], (count, width)) * 3
    arrays = {
        "old_log_prob": log_prob + 0.2 * jax.random.normal(keys[1], (count, width)),
        "ref_log_prob": log_prob + 0.3 * jax.random.normal(keys[2], (count, width)),
        "advantage": jax.random.normal(keys[3], (count,)),
        "mask": jnp.arange(width) < jnp.array([1, 6, 3, 2, 5, 6, 4, 1])[:count, None],
    }
    return log_prob, arrays


def _mean_loss(log_prob, arrays, **options):
    total, count, _ = losses.token_grpo_loss(log_prob, **arrays, kl_weight=0.1, **options)
    return total / count


def _gradient(options):
    return jax.jit(jax.grad(functools.partial(_mean_loss, **options)))


def _value(pair):
    return float(pair[0]) / float(pair[1])


@pytest.mark.trap(10)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_gradient_vanishes_in_exactly_two_corners(advantage, ratio):
    def loss(log_prob):
        total, _, metrics = losses.token_grpo_loss(
            log_prob, jnp.zeros((1, 1)), None, jnp.array([advantage]), jnp.ones((1, 1), bool)
        )
        return total, metrics

    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, metrics), gradient = differentiate(jnp.log(jnp.full((1, 1), ratio)))
    clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert (gradient[0, 0] == 0) == clipped
    if not clipped:
        np.testing.assert_allclose(gradient[0, 0], -advantage * ratio, rtol=1e-5)
    assert _value(metrics["clip_fraction_high"]) == float(clipped and advantage > 0)
    assert _value(metrics["clip_fraction_low"]) == float(clipped and advantage < 0)
    assert _value(metrics["ratio_deviation_max"]) == pytest.approx(abs(ratio - 1), abs=1e-6)


def test_asymmetric_and_dual_clip():
    ratio = jnp.array([1.25, 1.35, 5.0, 5.0])
    advantage = jnp.array([1.0, 1.0, -1.0, -0.5])
    loss = losses.clipped_surrogate(ratio[:, None], advantage[:, None], 0.2, 0.28)
    np.testing.assert_allclose(loss[:, 0], [-1.25, -1.28, 5.0, 2.5], rtol=1e-6)
    capped = losses.clipped_surrogate(ratio[:, None], advantage[:, None], 0.2, 0.28, dual_clip=3.0)
    np.testing.assert_allclose(capped[:, 0], [-1.25, -1.28, 3.0, 1.5], rtol=1e-6)


@pytest.mark.trap(9)
def test_kl_estimators():
    log_prob = jnp.linspace(-3, 0, 13)[None]
    ref = jnp.full((1, 13), -1.5)
    d = ref - log_prob
    np.testing.assert_allclose(losses.kl_estimate(log_prob, ref, "k1"), -d, atol=1e-6)
    np.testing.assert_allclose(losses.kl_estimate(log_prob, ref, "k2"), d**2 / 2, atol=1e-6)
    k3 = losses.kl_estimate(log_prob, ref, "k3")
    np.testing.assert_allclose(k3, np.exp(d) - d - 1, atol=1e-5)
    assert (k3 >= 0).all() and k3[0, 6] == 0
    gradient = jax.grad(lambda x: losses.kl_estimate(x, ref).sum())(log_prob)[0]
    assert gradient[6] == 0 and (gradient[:6] < 0).all() and (gradient[7:] > 0).all()
    with pytest.raises(ValueError, match="k4"):
        losses.kl_estimate(log_prob, ref, "k4")


def test_k3_is_unbiased_on_policy():
    policy = jax.nn.log_softmax(jnp.array([[0.3, -0.2, 1.0]]))
    reference = jax.nn.log_softmax(jnp.array([[-0.4, 0.6, 0.5]]))
    exact = (jnp.exp(policy) * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = jnp.exp(policy) * losses.kl_estimate(policy, reference, estimator)
        np.testing.assert_allclose(estimate.sum(), exact, rtol=1e-5)


@pytest.mark.trap(9)
def test_far_tokens_stay_finite_and_keep_their_gradient():
    log_prob = jnp.array([[-80.0, -1.0]])
    ref = jnp.array([[-1.0, -80.0]])
    value, gradient = jax.value_and_grad(lambda x: losses.kl_estimate(x, ref).sum())(log_prob)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0] < -1 and gradient[0, 1] > 0.9


@pytest.mark.trap(9)
def test_kl_raises_the_loss_away_from_the_reference():
    log_prob, arrays = _tokens()
    arrays |= {"advantage": jnp.zeros(8), "old_log_prob": None}
    differentiate = jax.jit(jax.value_and_grad(_mean_loss))
    value, gradient = differentiate(log_prob, arrays | {"ref_log_prob": log_prob})
    assert value == 0 and not np.any(gradient)
    value, gradient = differentiate(log_prob, arrays | {"ref_log_prob": log_prob - 0.5})
    assert value > 0 and (np.asarray(gradient)[np.asarray(arrays["mask"])] > 0).all()


def test_aggregations_against_their_formulas():
    log_prob, arrays = _tokens()
    m = np.asarray(arrays["mask"], np.float64)
    a = np.asarray(arrays["advantage"], np.float64)[:, None]
    log_ratio = np.asarray(log_prob - arrays["old_log_prob"], np.float64)
    d = np.asarray(arrays["ref_log_prob"] - log_prob, np.float64)
    kl = np.exp(d) - d - 1

    def surrogate(ratio, eps):
        return np.maximum(-a * ratio, -a * np.clip(ratio, 1 - eps, 1 + eps))

    token = surrogate(np.exp(log_ratio), 0.2) + 0.1 * kl
    lengths = m.sum(axis=1)
    sequence = surrogate(np.exp((m * log_ratio).sum(1) / lengths)[:, None], 0.05) + 0.1 * kl
    expected = {
        "grpo": ((m * token).sum(1) / lengths).mean(),
        "dr_grpo": (m * token).sum() / (8 * 12),
        "token_mean": (m * token).sum() / m.sum(),
        "gspo": ((m * sequence).sum(1) / lengths).mean(),
    }
    for options in AGGREGATIONS:
        loss = jax.jit(functools.partial(_mean_loss, **options))(log_prob, arrays)
        # Terms of order 1 cancel to a small loss, hence an absolute tolerance.
        np.testing.assert_allclose(loss, expected[options["aggregation"]], rtol=1e-5, atol=5e-7)


def test_gspo_gradient_weighs_all_tokens_of_a_sequence_alike():
    log_prob, arrays = _tokens()
    arrays["ref_log_prob"] = None

    def loss(log_prob):
        return losses.token_grpo_loss(log_prob, **arrays, aggregation="gspo", clip_low=9.0, clip_high=9.0)[0]

    gradient, mask = np.asarray(jax.jit(jax.grad(loss))(log_prob)), np.asarray(arrays["mask"])
    for row in range(8):
        inside = gradient[row][mask[row]]
        np.testing.assert_allclose(inside, inside[0], rtol=1e-5)
        assert inside[0] != 0 and not gradient[row][~mask[row]].any()


@pytest.mark.trap(11)
@pytest.mark.parametrize("options", AGGREGATIONS, ids=lambda o: o["aggregation"])
def test_gradient_does_not_depend_on_micro_batches(options):
    log_prob, arrays = _tokens()
    whole = _gradient(options)(log_prob, arrays)
    assert np.abs(whole).max() > 1e-3

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def part_gradient(x, part):
        return losses.token_grpo_loss(x, **part, kl_weight=0.1, **options)[:2]

    host, host_log_prob = jax.device_get(arrays), jax.device_get(log_prob)
    for parts in (2, 4, 8):
        size, gradients, counts = 8 // parts, [], 0.0
        for i in range(parts):
            rows = slice(i * size, (i + 1) * size)
            part = {k: v[rows] for k, v in host.items()}
            gradient, count = part_gradient(host_log_prob[rows], part)
            gradients.append(gradient)
            counts += count
        np.testing.assert_allclose(np.concatenate(gradients) / counts, whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", AGGREGATIONS, ids=lambda o: o["aggregation"])
def test_gradient_does_not_depend_on_devices_or_padding(options):
    log_prob, arrays = _tokens()
    whole = _gradient(options)(log_prob, arrays)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    placed = jax.device_put((log_prob, arrays), spec)
    sharded = _gradient(options)(*placed)
    np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-8)

    def widen(x, fill):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=fill)

    wide = {k: v if k == "advantage" else widen(v, 0) for k, v in arrays.items()}
    # Whatever a model computes for padding, infinities included, stays out.
    padded = _gradient(options)(widen(log_prob, -np.inf), wide)
    np.testing.assert_allclose(padded[:, :6], whole, rtol=1e-5, atol=1e-8)
    assert not padded[:, 6:].any()


def test_on_policy_identity():
    """Value 0 and gradient A grad log_prob / lengths, with and without explicit old values."""
    log_prob, arrays = _tokens()
    advantage, _ = group_advantages(arrays["advantage"].reshape(2, 4))
    arrays |= {"advantage": advantage.ravel(), "ref_log_prob": None}
    mask = np.asarray(arrays["mask"])
    expected = -np.asarray(advantage).ravel()[:, None] * mask / mask.sum(1, keepdims=True) / 8
    for old in (None, log_prob):

        def loss(x):
            total, count, metrics = losses.token_grpo_loss(x, **arrays | {"old_log_prob": old})
            return total / count, metrics

        (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(log_prob)
        assert abs(value) < 1e-6 and metrics["ratio_deviation_max"][0] == 0
        np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_entropy_is_only_reported():
    log_prob, arrays = _tokens()
    entropy = jnp.full((8, 6), 0.7)
    plain = losses.token_grpo_loss(log_prob, **arrays)
    total, count, metrics = losses.token_grpo_loss(log_prob, **arrays, entropy=entropy)
    assert total == plain[0] and count == plain[1]
    assert _value(metrics["entropy"]) == pytest.approx(0.7)


def test_bad_requests_are_named():
    log_prob, arrays = _tokens()
    with pytest.raises(ValueError, match="bnpo"):
        losses.token_grpo_loss(log_prob, **arrays, aggregation="bnpo")
    with pytest.raises(ValueError, match="max_tokens"):
        losses.token_grpo_loss(log_prob, **arrays, aggregation="dr_grpo")
    with pytest.raises(ValueError, match="ref_log_prob"):
        losses.token_grpo_loss(log_prob, **arrays | {"ref_log_prob": None}, kl_weight=0.1)
    flow = jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(ValueError, match="mean_shift"):
        losses.flow_grpo_loss(*flow, clip_range=1e-4, guard=True)
    with pytest.raises(ValueError, match="needs kl"):
        losses.flow_grpo_loss(*flow, clip_range=1e-4, kl_weight=0.1)


def _flow_arrays(count=6, steps=3):
    old, shift, advantage = jax.random.split(jax.random.key(0), 3)
    old = jax.random.normal(old, (count, steps))
    log_prob = old + 4e-4 * jax.random.normal(shift, (count, steps))
    return log_prob, old, jax.random.normal(advantage, (count,))


def test_flow_loss_formula_clip_sides_and_kl():
    log_prob, old, advantage = _flow_arrays()
    kl = jnp.abs(log_prob)
    total, count, metrics = losses.flow_grpo_loss(log_prob, old, advantage, clip_range=1e-4, kl=kl, kl_weight=0.04)
    ratio, a = np.exp(log_prob - old), np.asarray(advantage)[:, None]
    surrogate = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 1e-4, 1 + 1e-4))
    np.testing.assert_allclose(total, (surrogate + 0.04 * kl).sum(), rtol=1e-4)
    assert count == 18
    high, low = (a > 0) & (ratio > 1 + 1e-4), (a < 0) & (ratio < 1 - 1e-4)
    assert _value(metrics["clip_fraction_high"]) == pytest.approx(high.mean()) and high.any()
    assert _value(metrics["clip_fraction_low"]) == pytest.approx(low.mean()) and low.any()
    assert _value(metrics["kl"]) == pytest.approx(float(kl.mean()), rel=1e-5)


def test_flow_gradient_is_the_policy_gradient_and_splits_into_micro_batches():
    log_prob, _, advantage = jax.device_get(_flow_arrays())

    @jax.jit
    @jax.grad
    def differentiate(x, advantage):
        return losses.flow_grpo_loss(x, None, advantage, clip_range=1e-4)[0]

    gradient = differentiate(log_prob, advantage)
    np.testing.assert_allclose(gradient, -np.repeat(advantage[:, None], 3, 1), rtol=1e-5)
    halves = [differentiate(log_prob[r], advantage[r]) for r in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(np.concatenate(halves), gradient, rtol=1e-6)


def test_guard_reduces_to_scaled_grpo_without_a_mean_shift():
    log_prob, old, advantage = _flow_arrays()
    std, dt = jnp.array([0.7, 0.5, 0.3]), jnp.array([-0.04, -0.05, -0.06])
    guarded, _, _ = losses.flow_grpo_loss(
        log_prob,
        old,
        advantage,
        clip_range=2e-6,
        guard=True,
        mean_shift=jnp.zeros((6, 3)),
        std=std,
        dt=dt,
    )
    parts = [
        losses.flow_grpo_loss(std[i] * log_prob[:, i : i + 1], std[i] * old[:, i : i + 1], advantage, clip_range=2e-6)[
            0
        ]
        / -dt[i]
        for i in range(3)
    ]
    np.testing.assert_allclose(guarded, sum(parts), rtol=1e-4)


@pytest.mark.trap(28)
def test_guard_centres_the_log_ratio():
    """E[log rho] = -k without guard, 0 with it, when the mean has moved by a KL of k."""
    samples, dimensions, std = 4000, 256, jnp.float32(0.5)
    mean = jnp.zeros((samples, dimensions))
    x_next = sample_transition(jax.random.split(jax.random.key(1), samples), mean, std)
    moved = mean + 0.05 * jax.random.normal(jax.random.key(2), (1, dimensions))
    old = transition_log_prob(x_next, mean, std)[:, None]
    new = transition_log_prob(x_next, moved, std)[:, None]
    k = float(gaussian_kl(moved, mean, std)[0])
    shift = ((moved - mean) ** 2).mean(axis=1, keepdims=True)
    # With advantage -1 and a wide range the loss is the ratio itself.
    options = {"advantage": jnp.full(samples, -1.0), "clip_range": 0.9}
    plain, count, _ = losses.flow_grpo_loss(new, old, **options)
    guarded, _, _ = losses.flow_grpo_loss(
        new, old, **options, guard=True, mean_shift=shift, std=std[None], dt=jnp.array([-1.0])
    )
    spread = np.sqrt(2 * k / dimensions)
    tolerance = 5 * spread / np.sqrt(samples) + spread**2
    assert abs(float(plain / count) - 1 + k) < tolerance < k / 3
    assert abs(float(guarded / count) - 1) < tolerance


@pytest.mark.trap(15)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_token_bandit_learns_the_rewarded_token(sign):
    """Two tokens, reward sign for token 1: its probability moves one way at every step."""

    def step(logits, key):
        tokens = jax.random.categorical(key, logits, shape=(4, 16))
        advantage, _ = group_advantages(sign * tokens.astype(jnp.float32))
        tokens = tokens.reshape(-1, 1)

        def loss(logits):
            log_prob = jax.nn.log_softmax(logits)[tokens]
            total, count, _ = losses.token_grpo_loss(
                log_prob, None, None, advantage.ravel(), jnp.ones(tokens.shape, bool)
            )
            return total / count

        logits = logits - 0.2 * jax.grad(loss)(logits)
        return logits, jax.nn.softmax(logits)[1]

    _, probabilities = jax.lax.scan(step, jnp.zeros(2), jax.random.split(jax.random.key(0), 40))
    assert (np.diff(sign * probabilities) >= 0).all()
    assert sign * (probabilities[-1] - 0.5) > 0.3


@pytest.mark.trap(15)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_diffusion_bandit_moves_towards_the_reward(sign):
    """Reward -|x| (or |x|) on a policy with one parameter, a constant velocity bias."""
    sigmas, rule, dimensions, groups, size = jnp.asarray(sigma_schedule(4)), SdeStep(0.7), 4, 4, 16

    def step(bias, key):
        def predict(bias):
            return lambda x, sigma: 0.5 * x + bias

        keys = jax.random.split(key, groups * size + 1)
        noise = jax.random.normal(keys[0], (groups, 1, dimensions))
        noise = jnp.broadcast_to(noise, (groups, size, dimensions)).reshape(-1, dimensions)
        played = sampler.sample_window(predict(bias), noise, sigmas, rule, 0, 3, keys[1:])
        reward = -sign * jnp.abs(played.final).mean(axis=1)
        advantage, _ = group_advantages(reward.reshape(groups, size))

        def loss(bias):
            scored = sampler.replay_window(predict(bias), *played[:2], played.sigma_indices, sigmas, rule)
            total, count, _ = losses.flow_grpo_loss(
                scored.log_probs.T,
                played.log_probs.T,
                advantage.ravel(),
                clip_range=1e-4 * (65536 / dimensions) ** 0.5,
            )
            return total / count

        bias = bias - 0.5 * jax.grad(loss)(bias)
        return bias, bias

    run = jax.jit(lambda bias, keys: jax.lax.scan(step, bias, keys)[1])
    biases = run(jnp.float32(1.5), jax.random.split(jax.random.key(0), 20))
    assert (np.diff(sign * biases) < 0).all()
    assert sign * (1.5 - biases[-1]) > 0.3


def _nft(velocity, old=None, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), 3)
    target = velocity + jax.random.normal(keys[0], velocity.shape)
    sigma, advantage = jax.random.uniform(keys[1], (len(velocity),)), jax.random.normal(keys[2], (len(velocity),))
    found = losses.nft_loss(velocity, old, target, sigma, options.pop("advantage", advantage), **options)
    return found, (target, sigma, advantage)


def _nft_gradient(velocity, **options):
    fixed = jax.lax.stop_gradient(velocity)
    _, (target, sigma, advantage) = _nft(fixed)
    advantage = options.pop("advantage", advantage)
    return jax.grad(
        lambda v: losses.nft_loss(
            v,
            options.get("old"),
            target,
            sigma,
            advantage,
            **{name: value for name, value in options.items() if name != "old"},
        )[0]
    )(velocity)


def test_nft_gradient_on_policy_is_that_of_advantage_weighted_matching():
    velocity = jax.random.normal(jax.random.key(3), (6, 4, 3))
    _, (target, sigma, advantage) = _nft(velocity)
    error = velocity - target
    size = np.abs(error).mean((1, 2)) * sigma
    expected = (advantage * sigma**2 / size)[:, None, None] * 2 * error / error[0].size
    for options in ({}, {"advantage_bound": 9.0}, {"strength": 0.3}, {"old": velocity}):
        np.testing.assert_allclose(_nft_gradient(velocity, **options), expected, rtol=2e-5, atol=1e-7)


def test_nft_moves_nothing_without_advantage_and_bounds_large_ones():
    velocity = jax.random.normal(jax.random.key(3), (6, 4, 3))
    assert float(jnp.abs(_nft_gradient(velocity, advantage=jnp.zeros(6))).max()) < 1e-8
    np.testing.assert_allclose(
        _nft_gradient(velocity, advantage=jnp.full(6, 50.0)),
        _nft_gradient(velocity, advantage=jnp.full(6, 5.0)),
        rtol=1e-6,
    )


def test_nft_kl_is_the_mean_squared_difference_and_needs_a_reference():
    velocity = jax.random.normal(jax.random.key(3), (6, 4, 3))
    (plain, count, _), _ = _nft(velocity)
    (total, _, metrics), _ = _nft(velocity, reference=velocity + 2.0, kl_weight=0.5)
    assert float(count) == 6 and _value(metrics["kl"]) == pytest.approx(4.0)
    assert float(total - plain) == pytest.approx(6 * 0.5 * 4.0, rel=1e-5)
    assert _value(metrics["velocity_shift"]) == 0.0
    with pytest.raises(ValueError, match="needs reference"):
        _nft(velocity, kl_weight=0.5)


def test_awm_gradient_is_that_of_the_fourth_root_of_the_error_times_the_advantage():
    velocity = jax.random.normal(jax.random.key(3), (6, 4, 3))
    _, (target, sigma, advantage) = _nft(velocity)

    def awm(velocity, **more):
        return losses.awm_loss(velocity, None, target, sigma, advantage, **more)[0]

    mean = jnp.mean((velocity - target) ** 2, axis=(1, 2))
    expected = (advantage / 5 * sigma * mean**-0.75)[:, None, None] * 2 * (velocity - target) / 12
    np.testing.assert_allclose(jax.grad(awm)(velocity), expected, rtol=2e-5, atol=1e-7)
    kl = awm(velocity, reference=velocity + 2.0, kl_weight=0.5) - awm(velocity)
    assert float(kl) == pytest.approx(6 * 0.5 * 4.0, rel=1e-5)
    with pytest.raises(ValueError, match="needs reference"):
        awm(velocity, kl_weight=0.5)


def test_the_mask_of_dppo_leaves_out_what_has_moved_far_as_its_advantage_wants():
    """Four corners near and four far from the rollout policy: two far ones lose their gradient."""
    old = jnp.zeros((8, 1))
    log_prob = jnp.array([0.2, 0.2, -0.2, -0.2] * 2)[:, None]
    advantage = jnp.array([1.0, -1.0, 1.0, -1.0] * 2)
    shift = jnp.array([1e-3] * 4 + [1e-1] * 4)[:, None]  # KL 1e-3 / (2 * .5^2) = .002, and .2
    more = dict(clip_range=1e-4, divergence_limit=0.1, mean_shift=shift, std=jnp.array([0.5]))

    def loss(log_prob):
        return losses.flow_grpo_loss(log_prob, old, advantage, **more)[0]

    gradient = np.asarray(jax.grad(loss)(log_prob))[:, 0]
    expected = -np.asarray(advantage) * np.exp(np.asarray(log_prob)[:, 0])
    expected[[4, 7]] = 0  # far, and up with A > 0 or down with A < 0
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    metrics = losses.flow_grpo_loss(log_prob, old, advantage, **more)[2]
    assert _value(metrics["masked_fraction"]) == 2 / 8
    with pytest.raises(ValueError, match="divergence_limit needs"):
        losses.flow_grpo_loss(log_prob, old, advantage, clip_range=1e-4, divergence_limit=0.1)


def test_mask_and_clip_are_the_same_before_an_update():
    log_prob, advantage = jax.random.normal(jax.random.key(0), (6, 1)), jnp.arange(6.0) - 2.5
    more = dict(clip_range=1e-4, mean_shift=jnp.zeros((6, 1)), std=jnp.array([0.5]))
    clip, mask = (
        jax.value_and_grad(lambda x, how=how: losses.flow_grpo_loss(x, None, advantage, **more, **how)[0])(log_prob)
        for how in ({}, {"divergence_limit": 1e-5})
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clip, mask)


def test_the_guard_makes_the_gradient_of_the_velocity_flat_over_steps():
    """Size of the gradient in a velocity, by step: it grows fifteenfold without the guard, and is flat with it."""
    sigmas, shape = jnp.asarray(sigma_schedule(6, 4.0, "single")), (64, 8, 8)
    x, velocity, z = (jax.random.normal(jax.random.key(seed), shape) for seed in range(3))
    rule, advantage = SdeStep(0.7), jax.random.normal(jax.random.key(3), (64,))

    def size(step, guard):
        sigma, after = sigmas[step], sigmas[step + 1]
        mean, std = rule.transition(x, velocity, sigma, after, sigmas[1])
        outcome = mean + std * z

        def loss(velocity):
            now, _ = rule.transition(x, velocity, sigma, after, sigmas[1])
            log_prob = transition_log_prob(outcome, now, std)[:, None]
            shift = jnp.mean((now - mean) ** 2, axis=(1, 2))[:, None]
            more = dict(guard=True, mean_shift=shift, std=std[None], dt=(after - sigma)[None]) if guard else {}
            return losses.flow_grpo_loss(log_prob, None, advantage, clip_range=1e-3, **more)[0]

        return float(jnp.linalg.norm(jax.grad(loss)(velocity)))

    flat, plain = ([size(step, guard) for step in range(5)] for guard in (True, False))
    np.testing.assert_allclose(np.array(flat) / flat[0], [1.0] + [1 + 0.7**2 / 2] * 4, rtol=1e-3)
    assert plain[4] / plain[0] > 10
