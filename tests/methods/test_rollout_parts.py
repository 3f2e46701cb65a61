"""A rollout that is sampled in parts is the whole rollout, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import learner
from stage_pieces import nudged, stage_of, varied

from uae_jax.methods.method import gradients_of, make_rollout, make_train_step, with_advantages
from uae_jax.methods.stage_settings import SupervisedSettings
from uae_jax.settings import Mistakes
from uae_jax.training.step import init_state

# stage, its settings, and the slots that write the captions of all parts
CASES = {
    "gen_for_und": ("gen_for_und", dict(batch_size=4, group_size=3), 5),
    "flow_grpo": ("und_for_gen", dict(batch_size=4, group_size=2, flow_grpo=dict(advantage_scale="batch")), 0),
    "nft": ("und_for_gen", dict(batch_size=4, group_size=2, method="nft", nft=dict(advantage_scale="batch")), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parts_change_neither_samples_nor_gradient(whole, case):
    name, settings, slots = CASES[case]
    stage = stage_of(whole, name, **settings)
    (trained,) = stage.trained
    adapter = {trained: nudged(stage.trained[trained], size=0.05)}

    def outcome(method, micro_batches):
        def step(params):
            rollout = make_rollout(method, params, stage.frozen, stage.batch, stage.key)
            pieces = {name: rollout[name] for name in ("samples", "shared")}
            gradients, loss, _ = gradients_of(method.loss, params, stage.frozen, pieces, stage.key, micro_batches)
            return rollout, gradients, loss

        return jax.device_get(jax.jit(step)(adapter))

    whole_batch, gradients, loss = outcome(stage.method, 1)
    in_parts, accumulated, same = outcome(varied(stage.method, rollout_parts=2, rollout_slots=slots), 4)
    assert set(whole_batch["samples"]) == set(in_parts["samples"]) and "advantage" in in_parts["samples"]
    assert np.ptp(whole_batch["samples"]["advantage"]) > 0.5
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    close = dict(rtol=1e-3, atol=1e-5)  # rewards that differ by a few thousandths magnify their rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), in_parts["samples"], whole_batch["samples"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a / scale, b / scale, **close), accumulated, gradients)
    assert scale > 1e-6 and same == pytest.approx(loss, abs=1e-5)
    for metric, (total, count) in whole_batch["metrics"].items():
        if not metric.endswith("_max"):
            found = in_parts["metrics"][metric]
            assert found[0] / found[1] == pytest.approx(total / count, rel=1e-3, abs=1e-5), metric


class Groups(SupervisedSettings):
    """48 groups of 24, as flow_grpo has them."""

    samples_per_image = group_size = 24
    advantage_scale = "batch"


class GroupsInParts(Groups):
    """The same, sampled in twelve parts."""

    rollout_parts = 12


def test_accumulation_over_the_published_groups_is_the_whole_batch():
    """The change of an update in 12 parts of a rollout and 48 micro-batches is that of all 1,152 samples, to 1e-6."""

    def sample(params, frozen, batch, key):
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["id"])
        draws = jax.vmap(lambda key: jax.random.normal(key, (24, 3)))(keys).reshape(-1, 3)
        return {"samples": {"x": draws, "reward": jnp.sin(draws).sum(-1) + batch["id"].repeat(24) / 48}}

    def loss(params, frozen, rollout, key):
        samples = rollout["samples"]
        score = jnp.tanh(samples["x"] @ params["w"]) * samples["advantage"][:, None]
        return score.sum(), jnp.float32(len(score)), {}

    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
    outcomes = []
    for kind, micro_batches in ((Groups, 1), (GroupsInParts, 48)):
        method = learner(loss, sample, kind=kind, micro_batches=micro_batches, batch_size=48)
        step = jax.jit(make_train_step(method, optax.sgd(1.0)))
        state, metrics = step(init_state(params, optax.sgd(1.0)), {}, {"id": jnp.arange(48)}, jax.random.key(3))
        outcomes.append((jax.device_get(state.params["w"]) - params["w"], metrics))
    (whole_batch, told), (accumulated, again) = outcomes
    assert np.abs(whole_batch).max() > 1e-3
    np.testing.assert_allclose(accumulated, whole_batch, rtol=1e-6, atol=1e-6 * np.abs(whole_batch).max())
    assert float(told["reward"]) == pytest.approx(float(again["reward"]), abs=1e-6)


def test_advantages_are_those_of_the_whole_batch():
    """Equal rewards in every part of a batch are not equal in the batch."""
    rewards = np.array([[0.1, 0.2], [0.1, 0.2], [0.5, 0.9], [0.5, 0.9]], np.float32)

    class Settings:
        group_size, advantage_scale = 2, "batch"

    found = with_advantages({"samples": {"reward": rewards}, "metrics": {}}, Settings)["samples"]["advantage"]
    alone = with_advantages({"samples": {"reward": rewards[:2]}, "metrics": {}}, Settings)["samples"]["advantage"]
    assert np.abs(found[:2]).max() < np.abs(alone).max()
    np.testing.assert_allclose(found[:2], np.float32([[-0.05, 0.05]] * 2) / (rewards.std(ddof=1) + 1e-4), rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rollout_parts=3, batch_size=4), "rollout_parts is 3; it must divide batch_size, which is 4"),
        (dict(rollout_parts=2, batch_size=4, reward=dict(contrast=0.5)), "reward.contrast compares with all images"),
    ],
)
def test_parts_that_cannot_work_are_refused(whole, settings, message):
    method = stage_of(whole, "gen_for_und").method
    with pytest.raises(Mistakes, match=message):
        varied(method, **settings)
