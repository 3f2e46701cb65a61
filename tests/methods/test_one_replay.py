"""Flow-GRPO whose drawings part at one step: the gradient of independent replays, with one evaluation a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, nudged, stage_of, varied

from uae_jax.methods.method import gradients_of, make_rollout
from uae_jax.planning.flops import count_work

GROUP = 4
OWN = dict(
    one_replay=True,
    window=1,
    window_high=2,
    step_rule="sde",
    noise_level=0.7,
    grpo_guard=True,
    kl_kind="gaussian",
    kl_weight=0.05,
    clip_range=0.02,
)


def made(whole, **own):
    """The stage, a trained adapter, its rollout, and the adapter after an update."""
    stage = stage_of(whole, "und_for_gen", batch_size=4, group_size=GROUP, flow_grpo=OWN | own)
    stage.adapter = {"transformer_lora": nudged(stage.trained["transformer_lora"], size=0.05)}
    stage.later = {"transformer_lora": nudged(stage.adapter["transformer_lora"], seed=3, size=0.003)}
    stage.rollout = jax.jit(lambda params: make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key))(
        stage.adapter
    )
    return stage


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one update", "two updates"])
def stage(whole, request):
    return made(whole, updates_per_rollout=request.param)


def independent(stage):
    """The method and the rollout in which every drawing has the state of its group for its own."""
    samples, members = dict(stage.rollout["samples"]), stage.rollout["samples"]["advantage"].shape[1]
    rows = {
        name: leaf.reshape(-1, 1, *leaf.shape[3:])
        if name in ("next_latents", "sampled_log_prob", "old_log_prob")
        else leaf.reshape(-1)
        if name == "advantage"
        else leaf.repeat(members, axis=0)
        for name, leaf in samples.items()
    }
    return varied(stage.method, flow_grpo=dict(one_replay=False)), stage.rollout | {"samples": rows}


def gradients(method, stage, rollout, params, micro_batches=1):
    pieces = {name: rollout[name] for name in ("samples", "shared")}
    return jax.jit(lambda params: gradients_of(method.loss, params, stage.frozen, pieces, stage.key, micro_batches))(
        params
    )


@pytest.mark.slow
def test_the_gradient_is_that_of_independent_replays(stage):
    """Also of a policy that has moved, with its clipped ratios, its guard and its KL."""
    params = stage.later if stage.method.replay else stage.adapter
    one = gradients(stage.method, stage, stage.rollout, params)
    method, rollout = independent(stage)
    each = gradients(method, stage, rollout, params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(each[0])) > 1e-5
    assert largest_gap(each[0], one[0]) < 2e-4
    assert float(one[1]) == pytest.approx(float(each[1]), rel=1e-4, abs=1e-6)
    for name in ("kl", "ratio_deviation", "clip_fraction_low", "clip_fraction_high"):
        assert float(one[2][name][0]) == pytest.approx(float(each[2][name][0]), rel=1e-3, abs=1e-5), name
        assert float(one[2][name][1]) == float(each[2][name][1]) == 4 * GROUP
    if stage.method.replay:
        assert float(one[2]["ratio_deviation"][0]) > 0 and float(one[2]["kl"][0]) > 0


def test_the_loss_evaluates_a_group_once(stage):
    """The products of the traced gradient are those of independent replays divided by the drawings of a group."""

    def flops(method, rollout):
        pieces = {name: rollout[name] for name in ("samples", "shared")}
        context = method.with_contexts(pieces)
        pieces = {"samples": context, "shared": {**pieces["shared"], "images": {}}}
        return count_work(
            jax.grad(lambda params: method.loss(params, stage.frozen, pieces, stage.key)[0]), (stage.adapter,), (0,)
        ).flops

    # the low-rank kernels are joined once for any number of rows
    assert flops(*independent(stage)) / flops(stage.method, stage.rollout) == pytest.approx(GROUP, rel=0.05)


def test_before_an_update_the_ratio_is_one_and_the_reference_is_the_start(whole):
    stage = made(whole, updates_per_rollout=1)
    state = stage.state()
    _, metrics = stage.step(state)(state, stage.frozen, stage.batch, stage.key)
    assert float(metrics["ratio_deviation_max"]) == 0.0 and float(metrics["kl"]) < 1e-9
    assert float(metrics["log_prob_gap_max"]) < 1e-5 and float(metrics["grad_norm"]) > 0


@pytest.mark.slow
def test_micro_batches_and_halves_change_nothing(stage):
    one, two = (gradients(stage.method, stage, stage.rollout, stage.adapter, parts) for parts in (1, 2))
    assert largest_gap(one[0], two[0]) < 1e-4
    pieces = {name: stage.rollout[name] for name in ("samples", "shared")}
    halves = jax.jit(
        lambda params: gradients_of(stage.method.loss, params, stage.frozen, pieces, stage.key, 1, compared=1)
    )(stage.adapter)
    assert largest_gap(one[0], halves[0]) < 1e-4 and set(halves[2]) - set(one[2]) == {
        "gradient_cosine",
        "gradient_signal",
        "noise_scale",
    }
    assert -1 <= float(halves[2]["gradient_cosine"][0]) <= 1


@pytest.mark.slow
def test_drawings_are_compared_with_those_of_their_own_start(whole):
    stage = made(whole, starts=2)
    samples = jax.device_get(stage.rollout["samples"])
    assert samples["latents"].shape[:2] == (8, 1) and samples["next_latents"].shape[:3] == (8, 1, 2)
    assert samples["advantage"].shape == (8, 2)
    np.testing.assert_allclose(samples["advantage"].sum(1), 0, atol=1e-5)
    assert len(np.unique(samples["latents"][:, 0, 0, 0, 0])) == 8  # every start has its own noise
    contexts = samples["context"] if "context" in samples else stage.method.with_contexts(stage.rollout)["context"]
    np.testing.assert_array_equal(contexts[0], contexts[1])


@pytest.mark.slow
def test_dense_rewards_of_the_steps_add_up_to_that_of_the_drawing(whole):
    own = dict(one_replay=False, window=2, window_high=2, dense_rewards=True, advantage_scale="none", shared_noise=True)
    stage = made(whole, **own)
    samples = jax.device_get(stage.rollout["samples"])
    assert samples["advantage"].shape == (16, 2) and np.abs(samples["advantage"]).max() > 1e-4
    plain = varied(stage.method, flow_grpo=dict(dense_rewards=False))
    expected = jax.jit(lambda p: make_rollout(plain, p, stage.frozen, stage.batch, stage.key))(stage.adapter)
    # one starting noise: what the group had before the window is the same for all, and falls out
    np.testing.assert_allclose(samples["advantage"].sum(1), expected["samples"]["advantage"], atol=1e-4)
    dense, whole_reward = gradients(stage.method, stage, stage.rollout, stage.adapter), stage.rollout["metrics"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dense[0]))
    np.testing.assert_allclose(whole_reward["reward"][0], expected["metrics"]["reward"][0], rtol=1e-4)
    # a step's loss has its own advantage: with the drawing's for both the gradient is that of the plain method
    same = samples | {"advantage": np.repeat(np.asarray(expected["samples"]["advantage"])[:, None], 2, axis=1)}
    one = gradients(stage.method, stage, stage.rollout | {"samples": same}, stage.adapter)
    assert largest_gap(gradients(plain, stage, expected, stage.adapter)[0], one[0]) < 1e-3


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(one_replay=True, dense_rewards=True), "dense_rewards changes nothing with one_replay"),
        (dict(shuffled_rewards=True, dense_rewards=True), "shuffled_rewards is a control of rewards of whole drawings"),
        (dict(trust_region="dppo", step_rule="cps"), "trust_region 'dppo' needs the ratio of step_rule"),
        (dict(one_replay=True, window=2, window_high=2), "one_replay is on and window is 2"),
        (dict(starts=2), "starts is 2; several starting noises of a group need one_replay"),
        (dict(one_replay=True, starts=2), "starts is 2; the 2 drawings of a group must divide"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, tmp_path, own, message):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, und_for_gen=dict(flow_grpo=own)), tmp_path)
