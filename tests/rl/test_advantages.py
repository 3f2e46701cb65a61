import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.rl.advantages import group_advantages, nested_advantages

REWARDS = jnp.array([[0.1, 0.5, 0.9, 0.3], [2.0, 1.0, 4.0, 3.0], [0.2, 0.25, 0.2, 0.3]])


def _expected(rewards, scale="group"):
    rewards = np.asarray(rewards, np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if scale == "none":
        return centred
    axis = {"group": 1, "batch": None}[scale]
    return centred / (rewards.std(axis=axis, keepdims=True, ddof=1) + 1e-4)


def _value(pair):
    return float(pair[0]) / float(pair[1])


@pytest.mark.trap(12)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_against_numpy(scale):
    advantages, metrics = group_advantages(REWARDS, scale=scale)
    np.testing.assert_allclose(advantages, _expected(REWARDS, scale), rtol=1e-4)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-4)
    assert _value(metrics["reward_mean"]) == pytest.approx(float(REWARDS.mean()), rel=1e-5)
    assert _value(metrics["reward_std"]) == pytest.approx(float(REWARDS.std(axis=1, ddof=1).mean()))
    assert _value(metrics["zero_std_fraction"]) == _value(metrics["nan_fraction"]) == 0


@pytest.mark.trap(12)
def test_hand_vector():
    advantages, _ = group_advantages(jnp.array([[0.0, 1.0]]))
    np.testing.assert_allclose(advantages, np.array([[-0.5, 0.5]]) / (0.5**0.5 + 1e-4), rtol=1e-6)


@pytest.mark.trap(12)
@pytest.mark.parametrize("size", [3, 7, 8, 24])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_identical_rewards_give_exactly_zero(size, scale):
    rewards = jnp.stack([jnp.full(size, 0.35), jnp.arange(size) / 1.0])
    advantages, metrics = group_advantages(rewards, scale=scale)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).any()
    assert _value(metrics["zero_std_fraction"]) == 0.5


@pytest.mark.trap(12)
def test_noise_below_the_floor_is_not_amplified():
    rewards = jnp.array([[0.35, 0.3501, 0.3502], [0.1, 0.5, 0.9]])
    advantages, metrics = group_advantages(rewards)
    assert (advantages[0] == 0).all() and _value(metrics["zero_std_fraction"]) == 0.5
    kept, _ = group_advantages(jnp.array([[0.35, 0.352, 0.354]]))
    assert kept[0, 2] > 0.4
    dr, _ = group_advantages(rewards, scale="none")
    np.testing.assert_allclose(dr[0], [-1e-4, 0, 1e-4], atol=1e-7)


@pytest.mark.trap(12)
def test_large_offsets_do_not_spoil_small_differences():
    offset, step = 1000.0, 2.0**-10
    rewards = step * jnp.array([[0.0, 1.0, 2.0, 3.0]])
    advantages, _ = group_advantages(offset + rewards)
    np.testing.assert_allclose(advantages, _expected(rewards), rtol=1e-5)


@pytest.mark.trap(12)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_failed_rewards_get_zero_and_move_nobody(bad, scale):
    rewards = jnp.concatenate([REWARDS, jnp.full((3, 1), bad)], axis=1)
    advantages, metrics = group_advantages(rewards, scale=scale)
    assert (advantages[:, 4] == 0).all()
    np.testing.assert_allclose(advantages[:, :4], group_advantages(REWARDS, scale=scale)[0], rtol=1e-6)
    assert _value(metrics["nan_fraction"]) == pytest.approx(0.2)
    assert _value(metrics["reward_mean"]) == pytest.approx(float(REWARDS.mean()), rel=1e-5)


@pytest.mark.trap(12)
def test_groups_without_two_valid_rewards_get_zero():
    rewards = jnp.array([[jnp.nan, jnp.nan, jnp.nan], [jnp.nan, 0.7, jnp.nan], [0.1, 0.9, 0.5]])
    advantages, metrics = group_advantages(rewards)
    assert (advantages[:2] == 0).all() and (advantages[2, :2] != 0).all()
    assert _value(metrics["zero_std_fraction"]) == 0.5
    nothing, metrics = group_advantages(jnp.full((2, 2), jnp.nan))
    assert (nothing == 0).all() and np.isfinite(jax.tree.leaves(metrics)).all()
    alone, _ = group_advantages(jnp.array([[0.7], [0.2]]))
    assert (alone == 0).all()


@pytest.mark.trap(12, 40)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_are_rows_and_follow_permutations(scale):
    advantages, _ = group_advantages(REWARDS, scale=scale)
    rng = np.random.default_rng(0)
    rows, members = rng.permutation(3), rng.permutation(4)
    permuted, _ = group_advantages(REWARDS[rows][:, members], scale=scale)
    np.testing.assert_allclose(permuted, advantages[rows][:, members], rtol=1e-5, atol=1e-6)
    if scale != "batch":  # a group does not see the others
        alone, _ = group_advantages(REWARDS[1:2], scale=scale)
        np.testing.assert_allclose(alone[0], advantages[1], rtol=1e-6)


@pytest.mark.trap(12)
def test_large_advantages_are_bounded():
    rewards = jnp.zeros((1, 64)).at[0, 0].set(1.0)
    assert _expected(rewards).max() > 7
    assert group_advantages(rewards)[0].max() == 5


@pytest.mark.trap(12)
def test_jit_and_sharding_do_not_change_advantages():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    # samples of one group on two devices still see the complete group
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    sharded, _ = jax.jit(group_advantages)(jax.device_put(REWARDS, spec))
    np.testing.assert_allclose(sharded, group_advantages(REWARDS)[0], rtol=1e-5)


@pytest.mark.trap(12)
def test_an_unknown_scale_is_named():
    with pytest.raises(ValueError, match="variance"):
        group_advantages(REWARDS, scale="variance")


@pytest.mark.trap(12, 55)
def test_nested_advantages_are_those_of_means_and_of_drawings():
    rewards = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    of_captions, of_images, metrics = nested_advantages(jnp.asarray(rewards))
    np.testing.assert_allclose(of_captions, group_advantages(jnp.asarray(rewards.mean(-1)))[0], atol=1e-4)
    centred = rewards - rewards.mean(-1, keepdims=True)
    np.testing.assert_allclose(of_images, centred / (rewards.std(-1, ddof=1, keepdims=True) + 1e-4), atol=1e-4)
    order = np.array([2, 0, 1])
    again = nested_advantages(jnp.asarray(rewards[:, order]))
    np.testing.assert_allclose(again[0], np.asarray(of_captions)[:, order], atol=1e-5)
    np.testing.assert_allclose(again[1], np.asarray(of_images)[:, order], atol=1e-5)
    drawings = np.array([3, 1, 0, 2])
    again = nested_advantages(jnp.asarray(rewards[..., drawings]))
    np.testing.assert_allclose(again[0], of_captions, atol=1e-5)
    np.testing.assert_allclose(again[1], np.asarray(of_images)[..., drawings], atol=1e-5)
    for advantages in (of_captions, of_images):
        np.testing.assert_allclose(advantages.sum(-1), 0, atol=1e-5)
    assert float(metrics["between_share"][0]) <= float(metrics["between_share"][1])


@pytest.mark.trap(12)
def test_the_share_between_captions_is_that_of_the_rewards():
    rng = np.random.default_rng(1)
    captions, noise = rng.normal(size=(400, 8, 1)), rng.normal(size=(400, 8, 4))
    for weight, share in ((0.0, 0.0), (1.0, 0.5), (3.0, 0.9)):
        total, count = nested_advantages(jnp.asarray(weight * captions + noise))[2]["between_share"]
        assert float(total / count) == pytest.approx(share, abs=0.03)


@pytest.mark.trap(12)
def test_a_caption_without_a_finite_reward_moves_no_other():
    rewards = jnp.array([[[1.0, 2.0], [jnp.nan, jnp.nan], [3.0, 5.0]]])
    of_captions, of_images, _ = nested_advantages(rewards)
    assert of_captions[0, 1] == 0 and not np.asarray(of_images[0, 1]).any()
    np.testing.assert_allclose(of_captions[0, ::2], group_advantages(jnp.array([[1.5, 4.0]]))[0][0], atol=1e-5)
