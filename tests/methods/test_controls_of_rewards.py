"""The controls of und_for_gen: shuffled rewards, and flow matching on the same captions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import largest_gap, nudged, stage_of

from uae_jax.methods.method import gradients_of, make_rollout


@pytest.fixture(scope="module")
def matching(whole):
    return stage_of(whole, "und_for_gen", method="matching", matching=dict(updates_per_rollout=1))


@pytest.mark.slow
def test_flow_matching_on_the_captioners_captions_moves_the_transformer(matching):
    state = matching.state()
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = matching.step(state)(state, matching.frozen, matching.batch, matching.key)
    assert set(before) == {"transformer_lora"} and largest_gap(before, state.params) > 0
    assert float(metrics["loss"]) > 0 and float(metrics["caption_tokens"]) > 0 and "reward_std" not in metrics


@pytest.mark.slow
def test_its_loss_does_not_depend_on_micro_batches(matching):
    adapter = {"transformer_lora": nudged(matching.trained["transformer_lora"], size=0.05)}
    rollout = jax.jit(
        lambda params: make_rollout(matching.method, params, matching.frozen, matching.batch, matching.key)
    )(adapter)
    pieces = {name: rollout[name] for name in ("samples", "shared")}
    one, two = (
        jax.jit(lambda p, n=n: gradients_of(matching.method.loss, p, matching.frozen, pieces, matching.key, n))(adapter)
        for n in (1, 2)
    )
    assert largest_gap(one[0], two[0]) < 1e-3 and float(one[1]) == pytest.approx(float(two[1]), rel=1e-5)
    assert len(rollout["samples"]["latents"]) == matching.config.batch_size


@pytest.mark.parametrize(
    "own", [{}, dict(one_replay=True, window=1, window_high=2, starts=2)], ids=["groups", "starts"]
)
def test_rewards_are_shuffled_among_those_that_are_compared(whole, own):
    stage = stage_of(whole, "und_for_gen", batch_size=8, group_size=4, flow_grpo=dict(shuffled_rewards=True) | own)
    compared, ids = stage.config.compared_samples, jnp.arange(8)
    reward = jnp.arange(32.0).reshape(8, 4)
    found = np.asarray(stage.method.paid(reward.reshape(-1), ids, stage.key)).reshape(-1, compared)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.asarray(reward).reshape(-1, compared))
    assert (found != np.sort(found, axis=1)).any() and compared == (2 if own else 4)
    # the order belongs to the image
    half = stage.method.paid(reward[4:].reshape(-1), ids[4:], stage.key)
    np.testing.assert_array_equal(np.asarray(half).reshape(-1, compared), found[len(found) // 2 :])
    other = stage.method.paid(reward.reshape(-1), ids, jax.random.key(8))
    assert not np.array_equal(other, found.reshape(-1))
