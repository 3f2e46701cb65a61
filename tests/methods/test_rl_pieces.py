"""The RL methods in pieces: conditions, windows, guidance, micro-batches, and what carries a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import largest_gap, nudged, stage_of, varied

from uae_jax.methods.method import gradients_of, make_rollout
from uae_jax.methods.stage_settings import rollout_denoising
from uae_jax.models.language.generate import Completion
from uae_jax.rollouts import captioning
from uae_jax.rollouts.reconstruction import encode_condition


@pytest.fixture(scope="module")
def caption_stage(whole):
    """gen_for_und with a trained adapter that also encodes captions, and one rollout with its replay."""
    stage = stage_of(whole, "gen_for_und", condition="policy", updates_per_rollout=2)
    stage.adapter = {"language_lora": nudged(stage.trained["language_lora"], size=0.05)}
    rollout = jax.jit(lambda params: make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key))
    return stage, rollout, rollout(stage.adapter)


@pytest.fixture(scope="module")
def flow_stage(whole):
    """und_for_gen with guidance, guard and the velocity KL, a trained adapter, and its rollout as a function of the
    key.
    """
    own = dict(guidance_scale=3.0, grpo_guard=True, kl_kind="velocity", updates_per_rollout=1)
    stage = stage_of(whole, "und_for_gen", flow_grpo=own)
    stage.adapter = {"transformer_lora": nudged(stage.trained["transformer_lora"], size=0.05)}
    rollout = jax.jit(lambda params, key: make_rollout(stage.method, params, stage.frozen, stage.batch, key))
    return stage, rollout, rollout(stage.adapter, stage.key)


def _gradients(method, stage, rollout, micro_batches):
    """Gradient, loss and metrics of the stage's trained adapter."""

    def gradients(params):
        return gradients_of(method.loss, params, stage.frozen, {"shared": {}, **rollout}, stage.key, micro_batches)

    return jax.jit(gradients)(stage.adapter)


def test_conditions_of_policy_and_reference_differ_only_with_a_trained_adapter(caption_stage):
    stage, _, rollout = caption_stage
    how = rollout_denoising(stage.method.system.model, stage.config, stage.method.sampler, stage.config.guidance_scale)
    tokens = rollout["samples"]["tokens"][:, 0]
    lengths = jnp.full(len(tokens), 3, jnp.int32)

    @jax.jit
    def contexts(adapter):
        parts = {**stage.frozen, **adapter}
        return [
            encode_condition(stage.method.system.model, parts, dataclasses.replace(how, condition=on), tokens, lengths)[
                0
            ][0]
            for on in ("reference", "policy")
        ]

    fresh, trained = contexts(stage.trained), contexts(stage.adapter)
    np.testing.assert_array_equal(fresh[0], fresh[1])
    np.testing.assert_array_equal(fresh[0], trained[0])
    assert np.abs(np.asarray(trained[1] - trained[0])).max() > 1e-2


def test_replayed_log_probs_are_those_of_sampling(caption_stage):
    _, _, rollout = caption_stage
    total, count = rollout["metrics"]["log_prob_gap"]
    assert float(count) > 0 and float(total) / float(count) < 1e-4
    assert np.abs(np.asarray(rollout["samples"]["old"] - rollout["samples"]["reference"])).max() > 1e-2


def _loss_of(stage, method, rest=None):
    """`(samples) -> (sum, count, gradient), metrics` of the stage's trained adapter, each compiled with and without
    metrics.
    """

    def both(samples):
        def total(params):
            found, count, metrics = method.loss(params, stage.frozen, {"samples": samples, "shared": rest}, stage.key)
            return found, (count, metrics)

        (found, (count, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(stage.adapter)
        return (found, count, gradient), metrics

    return jax.jit(both), jax.jit(lambda samples: both(samples)[0])


def _values(metrics):
    return {name: float(total) / float(count) for name, (total, count) in metrics.items()}


@pytest.mark.trap(34)
def test_a_wrong_sampled_log_prob_shows_in_the_gap_and_nowhere_else(caption_stage):
    stage, _, rollout = caption_stage
    samples = {name: value for name, value in rollout["samples"].items() if name != "old"}
    samples["sampled_log_prob"] = rollout["samples"]["old"]
    wrong = samples | {
        "sampled_log_prob": samples["sampled_log_prob"]
        .at[0, 1, 0]
        .add(0.25)
        .at[1, 0, -1]
        .add(9.0 * ~samples["mask"][1, 0, -1])
    }
    with_metrics, alone = _loss_of(stage, varied(stage.method, updates_per_rollout=1))
    right, metrics = with_metrics(samples)
    same, moved = with_metrics(wrong)
    jax.tree.map(np.testing.assert_array_equal, right, same)
    assert largest_gap(right, alone(wrong)) < 1e-5  # another program, which may round otherwise
    metrics, moved, tokens = _values(metrics), _values(moved), int(samples["mask"].sum())
    assert metrics["log_prob_gap_max"] < 1e-5
    assert moved["log_prob_gap_max"] == pytest.approx(0.25, abs=1e-4)
    assert moved["log_prob_gap"] == pytest.approx(0.25 / tokens, abs=1e-5)
    assert {name: value for name, value in metrics.items() if "gap" not in name} == {
        name: value for name, value in moved.items() if "gap" not in name
    }


def test_dual_clip_and_the_estimator_of_kl_reach_the_loss(caption_stage):
    stage, _, rollout = caption_stage
    # policy twice as far above its sampled self as dual_clip allows, where the advantage is negative
    samples = rollout["samples"] | {
        "old": rollout["samples"]["old"] - np.log(6.0),
        "advantage": -jnp.ones_like(rollout["samples"]["advantage"]),
    }

    def loss(**settings):
        method = varied(stage.method, **({"kl_weight": 0.0} | settings))
        total, count, metrics = jax.jit(
            lambda params: method.loss(params, stage.frozen, {"samples": samples, "shared": {}}, stage.key)
        )(stage.adapter)
        return float(total) / float(count), _values(metrics)

    assert loss()[0] == pytest.approx(6.0, rel=1e-4) and loss(dual_clip=3.0)[0] == pytest.approx(3.0, rel=1e-4)
    first, third = loss(kl_weight=1.0, kl_estimator="k1")[1]["kl"], loss(kl_weight=1.0)[1]["kl"]
    assert third > 0 and abs(first - third) > 1e-6
    with pytest.raises(ValueError, match="dual_clip is 0.5"):
        dataclasses.replace(stage.config, dual_clip=0.5)


@pytest.mark.trap(34)
@pytest.mark.slow
def test_a_wrong_velocity_shows_in_the_gaps_of_one_update(flow_stage):
    stage, _, rollout = flow_stage
    unguided = varied(stage.method, flow_grpo=dict(guidance_scale=1.0))
    now = jax.jit(
        lambda params: unguided.replayed(
            {**stage.frozen, **params}, stage.method.with_contexts(rollout), rollout["shared"], trained=True
        )
    )(stage.adapter)
    samples = rollout["samples"] | {"velocity": now.velocities.swapaxes(0, 1), "sampled_log_prob": now.log_probs.T}
    with_metrics, alone = _loss_of(stage, unguided, rollout["shared"])
    right, metrics = with_metrics(samples)
    assert largest_gap(right, alone(samples)) < 1e-5  # another program, which may round otherwise
    metrics = _values(metrics)
    assert all(
        metrics[name] < 1e-5 for name in ("velocity_gap", "velocity_gap_max", "log_prob_gap", "log_prob_gap_max")
    )
    wrong = samples | {"velocity": samples["velocity"].at[1, 0, 0, 0, 0].add(0.5)}
    moved = _values(with_metrics(wrong)[1])
    assert moved["velocity_gap_max"] == pytest.approx(0.5, abs=1e-4)
    assert moved["velocity_gap"] == pytest.approx(0.5 / samples["velocity"].size, abs=1e-5)
    same, moved = with_metrics(samples | {"sampled_log_prob": samples["sampled_log_prob"].at[0, -1].add(0.5)})
    jax.tree.map(np.testing.assert_array_equal, right, same)
    moved = _values(moved)
    assert moved["log_prob_gap_max"] == pytest.approx(0.5, abs=1e-4) and moved["velocity_gap_max"] < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_images_keeps_the_captions_of_the_data(flow_stage, share):
    stage, _, _ = flow_stage
    length = stage.config.max_new_tokens
    batch = {name: jnp.concatenate([stage.batch[name]] * 8) for name in ("caption_ids", "caption_mask")}
    batch["sample_id"] = jnp.arange(len(batch["caption_ids"]))
    said = jnp.full((len(batch["sample_id"]), length), 2, jnp.int32)
    completion = Completion(said, said == 2, None, said[:, 0] == 0)
    tokens, lengths = captioning.drawn_captions(share, completion, batch, stage.key)
    kept = np.array([bool((row[:2] == given[:2]).all()) for row, given in zip(tokens, batch["caption_ids"])])
    assert abs(kept.mean() - share) < (0.2 if share == 0.5 else 1e-9)
    words = np.asarray(batch["caption_mask"]).sum(-1) - 1
    np.testing.assert_array_equal(lengths, np.where(kept, words, length))
    # the choice belongs to the image, not to its place in the batch
    halves = {name: leaf[len(leaf) // 2 :] for name, leaf in batch.items()}
    half = Completion(*(None if leaf is None else leaf[len(leaf) // 2 :] for leaf in completion))
    np.testing.assert_array_equal(
        captioning.drawn_captions(share, half, halves, stage.key)[0], tokens[len(tokens) // 2 :]
    )


@pytest.mark.slow
def test_drawings_of_a_group_can_begin_with_one_noise_and_differ_by_the_window_alone(whole):
    own = dict(shared_noise=True, window=1, window_low=1, window_high=2, kl_weight=0.0)
    stage = stage_of(whole, "und_for_gen", flow_grpo=own)
    rollout = jax.jit(lambda: make_rollout(stage.method, stage.trained, stage.frozen, stage.batch, stage.key))()
    group = stage.config.group_size
    before, after = (
        np.asarray(rollout["samples"][name]).reshape(-1, group, *rollout["samples"][name].shape[1:])
        for name in ("latents", "next_latents")
    )
    np.testing.assert_array_equal(before[:, :1].repeat(group, 1), before)
    assert (
        all(np.abs(row[0] - row[1]).max() > 0.01 for row in after) and np.abs(before[0, 0] - before[1, 0]).max() > 0.1
    )


@pytest.mark.trap(14)
def test_no_gradient_passes_through_the_reward(caption_stage):
    stage, _, _ = caption_stage

    def advantage(params):
        return make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key)["samples"]["advantage"]

    direction = nudged(jax.tree.map(jnp.zeros_like, stage.adapter), seed=4, size=1.0)
    value, slope = jax.jit(lambda params: jax.jvp(advantage, (params,), (direction,)))(stage.adapter)
    assert np.abs(np.asarray(value)).max() > 0.1
    np.testing.assert_array_equal(slope, np.zeros_like(slope))


def test_caption_gradient_does_not_depend_on_micro_batches(caption_stage):
    stage, _, rollout = caption_stage
    one, two = (_gradients(stage.method, stage, {"samples": rollout["samples"]}, parts) for parts in (1, 2))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[0])) > 1e-3
    assert largest_gap(one[0], two[0]) < 1e-4
    assert float(one[1]) == pytest.approx(float(two[1]), abs=1e-5)
    pieces = {"samples": rollout["samples"], "shared": {}}
    count = jax.jit(lambda params: stage.method.loss(params, stage.frozen, pieces, stage.key)[1])(stage.adapter)
    assert float(count) == stage.config.batch_size * stage.config.group_size


def test_flow_gradient_does_not_depend_on_micro_batches(flow_stage):
    stage, _, rollout = flow_stage
    pieces = {name: rollout[name] for name in ("samples", "shared")}
    one, two = (_gradients(stage.method, stage, pieces, parts) for parts in (1, 2))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[0])) > 1e-6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one[0]))
    assert largest_gap(one[0], two[0]) < 1e-3
    for name in ("ratio_deviation_max", "kl"):
        assert all(np.isfinite(float(number)) for number in one[2][name])
    assert float(one[2]["ratio_deviation_max"][0]) < 1e-6 and float(one[2]["kl"][0]) > 0


@pytest.mark.slow
def test_nft_gradient_does_not_depend_on_micro_batches_and_its_levels_belong_to_the_drawing(whole):
    stage = stage_of(whole, "und_for_gen", method="nft", nft=dict(updates_per_rollout=1, kl_weight=0.1))
    stage.adapter = {"transformer_lora": nudged(stage.trained["transformer_lora"], size=0.05)}
    rollout = jax.jit(lambda params: make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key))(
        stage.adapter
    )
    pieces = {name: rollout[name] for name in ("samples", "shared")}
    one, two = (_gradients(stage.method, stage, pieces, parts) for parts in (1, 2))
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[0])) > 1e-6
    assert largest_gap(one[0], two[0]) < 1e-3
    assert float(one[2]["kl"][0]) > 0
    sigma = np.asarray(rollout["samples"]["sigma"])
    assert sigma.shape == (stage.config.batch_size * stage.config.group_size, stage.config.own.levels)
    assert len(np.unique(sigma)) == sigma.size and sigma.min() >= 0 and sigma.max() <= 1


@pytest.mark.slow
def test_flow_gradient_of_one_update_is_that_of_a_replayed_rollout(flow_stage):
    stage, _, rollout = flow_stage
    samples, shared = stage.method.with_contexts(rollout), rollout["shared"]
    again = varied(stage.method, flow_grpo=dict(updates_per_rollout=2))
    compared = jax.jit(lambda params: again.compared({**stage.frozen, **params}, samples, shared))(stage.adapter)
    assert "old_log_prob" in compared and "old_log_prob" not in samples
    unchanged = _gradients(stage.method, stage, {"samples": samples, "shared": shared}, 1)
    replayed = _gradients(again, stage, {"samples": samples | compared, "shared": shared}, 1)
    assert largest_gap(unchanged[0], replayed[0]) < 1e-3
    np.testing.assert_allclose(unchanged[2]["kl"][0], replayed[2]["kl"][0], rtol=1e-3)


@pytest.mark.slow
def test_the_window_comes_from_the_key_and_is_shared(flow_stage):
    stage, rollout, first = flow_stage
    starts = set()
    for number in range(8):
        found = rollout(stage.adapter, jax.random.key(number))
        indices = np.asarray(found["shared"]["sigma_indices"])
        assert indices.shape == (stage.config.own.window,)
        starts.add(int(indices[0]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found["samples"]))
    assert starts == {0, 1}
    again = rollout(stage.adapter, stage.key)
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.trap(23)
def test_guidance_has_a_negative_context_and_replays_exactly(flow_stage):
    stage, _, rollout = flow_stage
    states, mask = rollout["shared"]["negative"]
    template = stage.method.system.model.template
    assert states.shape[0] == 1 and int(mask.sum()) == len(template.prefix) + 2 + len(template.suffix)
    replayed = stage.method.replayed(
        {**stage.frozen, **stage.adapter}, stage.method.with_contexts(rollout), rollout["shared"], trained=True
    )
    np.testing.assert_allclose(replayed.log_probs.T, rollout["samples"]["sampled_log_prob"], atol=1e-5)


def test_members_of_a_group_draw_the_same_caption_with_their_own_noise(flow_stage):
    stage, _, rollout = flow_stage
    group = stage.config.group_size
    assert len(rollout["shared"]["images"]["context"]) == stage.config.batch_size
    context = np.asarray(stage.method.with_contexts(rollout)["context"]).reshape(stage.config.batch_size, group, -1)
    np.testing.assert_array_equal(context, np.broadcast_to(context[:, :1], context.shape))
    assert len(np.unique(context[:, 0], axis=0)) > 1
    latents = np.asarray(rollout["samples"]["latents"]).reshape(stage.config.batch_size * group, -1)
    assert len(np.unique(latents[:, 0])) == len(latents)
