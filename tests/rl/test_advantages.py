import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.rl.advantages import check_group_size, combine_advantages, group_advantages

REWARDS = np.array([[0.1, 0.5, 0.9, 0.3], [2.0, 1.0, 4.0, 3.0], [0.2, 0.25, 0.2, 0.3]])


def _expected(rewards, ddof, eps, scale="group"):
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    axis = {"group": 1, "batch": None}[scale]
    return centred / (rewards.std(axis=axis, keepdims=True, ddof=ddof) + eps)


def _value(pair):
    return float(pair[0]) / float(pair[1])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_against_numpy(scale, ddof, eps):
    advantages, metrics = group_advantages(REWARDS, scale=scale, ddof=ddof, eps=eps, clip=None)
    np.testing.assert_allclose(advantages, _expected(REWARDS, ddof, eps, scale), rtol=1e-4)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-4)
    assert _value(metrics["reward_mean"]) == pytest.approx(REWARDS.mean(), rel=1e-5)
    assert _value(metrics["reward_std"]) == pytest.approx(REWARDS.std(axis=1, ddof=ddof).mean())
    assert _value(metrics["zero_std_fraction"]) == _value(metrics["nan_fraction"]) == 0


def test_hand_vector():
    advantages, _ = group_advantages([[0.0, 1.0]], ddof=1, eps=0.0)
    np.testing.assert_allclose(advantages, [[-(0.5**0.5), 0.5**0.5]], rtol=1e-6)
    advantages, _ = group_advantages([[0.0, 1.0]], ddof=0, eps=0.5)
    np.testing.assert_allclose(advantages, [[-0.5, 0.5]], rtol=1e-6)


@pytest.mark.parametrize("size", [3, 7, 8, 24])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_identical_rewards_give_exactly_zero(size, scale):
    rewards = jnp.stack([jnp.full(size, 0.35), jnp.arange(size) / 1.0])
    advantages, metrics = group_advantages(rewards, scale=scale, eps=1e-8, std_floor=0.0)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).any()
    assert _value(metrics["zero_std_fraction"]) == 0.5


def test_noise_below_the_floor_is_not_amplified():
    rewards = jnp.array([[0.35, 0.3501, 0.3502], [0.1, 0.5, 0.9]])
    advantages, metrics = group_advantages(rewards)
    assert (advantages[0] == 0).all() and _value(metrics["zero_std_fraction"]) == 0.5
    kept, _ = group_advantages(rewards, std_floor=0.0)
    assert kept[0, 2] > 0.4
    dr, _ = group_advantages(rewards, scale="none")
    np.testing.assert_allclose(dr[0], [-1e-4, 0, 1e-4], atol=1e-7)


def test_large_offsets_do_not_spoil_small_differences():
    offset, step = 1000.0, 2.0**-10
    rewards = offset + step * jnp.array([[0.0, 1.0, 2.0, 3.0]])
    advantages, _ = group_advantages(rewards, std_floor=0.0, eps=0.0)
    np.testing.assert_allclose(advantages, _expected(np.array([[0.0, 1, 2, 3]]), 1, 0), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_failed_rewards_get_zero_and_move_nobody(bad, scale):
    rewards = np.concatenate([REWARDS, np.full((3, 1), bad)], axis=1)
    advantages, metrics = group_advantages(rewards, scale=scale, clip=None)
    assert (advantages[:, 4] == 0).all()
    np.testing.assert_allclose(advantages[:, :4], group_advantages(REWARDS, scale=scale, clip=None)[0], rtol=1e-6)
    assert _value(metrics["nan_fraction"]) == pytest.approx(0.2)
    assert _value(metrics["reward_mean"]) == pytest.approx(REWARDS.mean(), rel=1e-5)


def test_masked_rewards_do_not_count_as_failed():
    rewards = np.concatenate([REWARDS, np.full((3, 1), 100.0)], axis=1)
    advantages, metrics = group_advantages(rewards, mask=rewards < 50, clip=None)
    np.testing.assert_allclose(advantages[:, :4], _expected(REWARDS, 1, 1e-4), rtol=1e-4)
    assert (advantages[:, 4] == 0).all() and _value(metrics["nan_fraction"]) == 0


def test_groups_without_two_valid_rewards_get_zero():
    rewards = np.array([[np.nan, np.nan, np.nan], [np.nan, 0.7, np.nan], [0.1, 0.9, 0.5]])
    advantages, metrics = group_advantages(rewards)
    assert (advantages[:2] == 0).all() and (advantages[2, :2] != 0).all()
    assert _value(metrics["zero_std_fraction"]) == 0.5
    nothing, metrics = group_advantages(np.full((2, 2), np.nan))
    assert (nothing == 0).all() and np.isfinite(jax.tree.leaves(metrics)).all()


def test_singleton_groups():
    advantages, _ = group_advantages(jnp.array([[0.7], [0.2]]))
    assert (advantages == 0).all()
    with pytest.raises(ValueError, match="at least 2 samples a group"):
        check_group_size(1)
    check_group_size(2)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_ids_equal_rows_and_follow_permutations(scale):
    rows, _ = group_advantages(REWARDS, scale=scale)
    ids = np.repeat(np.arange(3), 4)
    order = np.random.default_rng(0).permutation(12)
    flat, metrics = group_advantages(REWARDS.ravel()[order], ids[order], 3, scale=scale)
    np.testing.assert_allclose(flat, np.asarray(rows).ravel()[order], rtol=1e-5, atol=1e-6)
    assert float(metrics["zero_std_fraction"][1]) == 3


def test_groups_of_unequal_size_and_absent_groups():
    rewards = np.array([0.1, 0.9, 0.2, 0.5, 0.8, 0.4])
    ids = np.array([2, 0, 2, 0, 0, 3])
    advantages, metrics = group_advantages(rewards, ids, 5)
    for group in (0, 2):
        members = ids == group
        expected = _expected(rewards[None, members], 1, 1e-4)[0]
        np.testing.assert_allclose(advantages[members], expected, rtol=1e-4)
    assert advantages[5] == 0
    assert [float(x) for x in metrics["zero_std_fraction"]] == [1, 3]


def test_clip():
    rewards = np.zeros((1, 64))
    rewards[0, 0] = 1.0
    assert group_advantages(rewards)[0].max() == 5
    assert group_advantages(rewards, clip=None)[0].max() > 7


def test_jit_and_sharding_do_not_change_advantages():
    devices = np.array(jax.devices()[:2])
    mesh = jax.sharding.Mesh(devices, ("data",))
    # A sample axis cut in the middle of a group still sees the whole group.
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rewards, ids = REWARDS.astype(np.float32).ravel(), np.repeat(np.arange(3), 4)
    assert rewards.size % len(devices) == 0
    placed = jax.device_put(rewards, spec), jax.device_put(ids, spec)
    sharded, _ = jax.jit(lambda r, i: group_advantages(r, i, 3))(*placed)
    np.testing.assert_allclose(sharded, group_advantages(rewards, ids, 3)[0], rtol=1e-5)


def test_weighted_sum_of_rewards():
    rewards = {"a": REWARDS, "b": REWARDS[::-1]}
    combined, metrics = combine_advantages(rewards, {"a": 1.0, "b": 0.5})
    expected, _ = group_advantages(REWARDS + 0.5 * REWARDS[::-1])
    np.testing.assert_allclose(combined, expected, rtol=1e-5)
    assert _value(metrics["a/reward_mean"]) == pytest.approx(REWARDS.mean(), rel=1e-5)


def test_normalising_first_lets_a_small_reward_count():
    rng = np.random.default_rng(1)
    rewards = {"large": rng.normal(size=(4, 8)), "small": 0.01 * rng.normal(size=(4, 8))}
    weights = {"large": 1.0, "small": 1.0}

    def correlations(method):
        combined, _ = combine_advantages(rewards, weights, method=method)
        alone = [_expected(r, 1, 1e-4) for r in rewards.values()]
        return [np.corrcoef(combined.ravel(), a.ravel())[0, 1] for a in alone]

    assert correlations("weighted_sum")[0] > 0.9 > 0.5 > correlations("weighted_sum")[1]
    assert min(correlations("normalize_then_sum")) > 0.5
    combined, _ = combine_advantages(rewards, weights, method="normalize_then_sum")
    np.testing.assert_allclose(combined.sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(combined.std(), 1, rtol=1e-3)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="variance"):
        group_advantages(REWARDS, scale="variance")
    with pytest.raises(ValueError, match="group ids"):
        group_advantages(REWARDS.ravel())
    with pytest.raises(ValueError, match="num_groups"):
        group_advantages(REWARDS.ravel(), np.zeros(12, int))
    with pytest.raises(ValueError, match="same names"):
        combine_advantages({"a": REWARDS}, {"b": 1.0})
    with pytest.raises(ValueError, match="mean"):
        combine_advantages({"a": REWARDS}, {"a": 1.0}, method="mean")
