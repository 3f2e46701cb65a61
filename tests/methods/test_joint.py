"""The joint update: one rollout, two learners, each with the loss and the credit of its own method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, nudged, stage_of, varied

from uae_jax import sharding, trees
from uae_jax.methods.method import gradients_of, make_rollout
from uae_jax.rl.advantages import group_advantages
from uae_jax.stages import run as run_module

BATCH, CAPTIONS, DRAWINGS = 4, 3, 2
FLOW = dict(one_replay=True, window=1, window_high=2, step_rule="sde", kl_weight=0.05, updates_per_rollout=1)


def joint_of(whole, flow=None, **own):
    return stage_of(
        whole,
        "und_for_gen",
        method="joint",
        batch_size=BATCH,
        group_size=DRAWINGS,
        temperature=1.0,
        joint=dict(captions=CAPTIONS) | own,
        flow_grpo=FLOW | (flow or {}),
    )


@pytest.fixture(scope="module")
def stage(whole):
    """A stage whose both adapters have moved, and its rollout."""
    stage = joint_of(whole)
    stage.adapters = {name: nudged(leaf, size=0.05) for name, leaf in stage.trained.items()}
    stage.rollout = jax.jit(lambda params: make_rollout(stage.method, params, stage.frozen, stage.batch, stage.key))(
        stage.adapters
    )
    return stage


def gradients(loss, params, frozen, rollout, key, micro_batches=1):
    pieces = {"samples": rollout["samples"], "shared": rollout.get("shared", {})}
    return jax.jit(lambda params: gradients_of(loss, params, frozen, pieces, key, micro_batches))(params)


@pytest.fixture(scope="module")
def both(stage):
    return gradients(stage.method.loss, stage.adapters, stage.frozen, stage.rollout, stage.key)


@pytest.mark.slow
def test_one_step_moves_both_parts_at_ratio_one(stage, whole):
    assert set(stage.trained) == {"language_lora", "transformer_lora"}
    state = stage.state()
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = stage.step(state)(state, stage.frozen, stage.batch, stage.key)
    numbers = {name: float(value) for name, value in metrics.items()}
    for half in ("", "caption_"):
        assert numbers[f"{half}ratio_deviation_max"] == 0.0 and abs(numbers[f"{half}kl"]) < 1e-9
        assert numbers[f"{half}reward_std"] > 0 and numbers[f"{half}log_prob_gap_max"] < 1e-4
    for name in stage.trained:
        assert largest_gap(before[name], state.params[name]) > 0, name
    assert all(np.isfinite(value) for value in numbers.values())


@pytest.mark.slow
def test_the_captioners_half_is_gen_for_und_where_the_decoder_is_frozen(stage, both):
    captioner, samples = stage.method.captioner, stage.rollout["samples"]
    alone = {"samples": samples["captions"] | {"advantage": samples["caption_advantage"]}}
    frozen = stage.frozen | {"transformer_lora": stage.adapters["transformer_lora"]}
    found = gradients(captioner.loss, {"language_lora": stage.adapters["language_lora"]}, frozen, alone, stage.key)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0])) > 1e-4
    assert largest_gap(found[0]["language_lora"], both[0]["language_lora"]) < 1e-4
    assert captioner.settings.group_size == CAPTIONS


def test_the_decoders_half_is_flow_grpo_where_the_captioner_is_frozen(stage, both):
    decoder, samples = stage.method.decoder, stage.rollout["samples"]
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), samples["drawings"])
    rows["advantage"] = samples["advantage"].reshape(BATCH * CAPTIONS, DRAWINGS)
    alone = {"samples": rows, "shared": stage.rollout["shared"]}
    frozen = stage.frozen | {"language_lora": stage.adapters["language_lora"]}
    found = gradients(decoder.loss, {"transformer_lora": stage.adapters["transformer_lora"]}, frozen, alone, stage.key)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0])) > 1e-5
    assert largest_gap(found[0]["transformer_lora"], both[0]["transformer_lora"]) < 1e-4
    assert float(both[1]) == pytest.approx(
        float(found[1])
        + float(
            gradients(
                stage.method.captioner.loss,
                stage.adapters,
                stage.frozen,
                {"samples": samples["captions"] | {"advantage": samples["caption_advantage"]}},
                stage.key,
            )[1]
        ),
        abs=1e-5,
    )


def test_each_half_gets_the_credit_of_what_it_did(stage):
    reward = jax.random.uniform(jax.random.key(0), (BATCH, CAPTIONS, DRAWINGS))
    found, metrics = stage.method.advantages(reward)
    own = stage.method.own.captioner.advantage_scale
    np.testing.assert_allclose(found["caption_advantage"], group_advantages(reward.mean(-1), scale=own)[0], atol=1e-6)
    # what a caption is worth is no credit of the decoder's, and luck of drawings none of the captioner's
    better, _ = varied(stage.method, flow_grpo=dict(advantage_scale="none")).advantages(reward)
    shifted, _ = varied(stage.method, flow_grpo=dict(advantage_scale="none")).advantages(
        reward + jnp.arange(CAPTIONS)[None, :, None]
    )
    np.testing.assert_allclose(better["advantage"], shifted["advantage"], atol=1e-5)
    np.testing.assert_allclose(found["advantage"].sum(-1), 0, atol=1e-5)
    lucky, _ = stage.method.advantages(reward + jnp.array([0.5, -0.5]))
    np.testing.assert_allclose(lucky["caption_advantage"], found["caption_advantage"], atol=1e-4)
    assert float(metrics["reward"][0]) / float(metrics["reward"][1]) == pytest.approx(float(reward.mean()), rel=1e-5)


def test_starting_noises_are_crossed_with_captions(stage, whole):
    latents = np.asarray(stage.rollout["samples"]["drawings"]["latents"]).reshape(BATCH, CAPTIONS, -1)
    if int(stage.rollout["shared"]["sigma_indices"][0]) == 0:
        np.testing.assert_array_equal(latents, latents[:, :1].repeat(CAPTIONS, 1))
    each = joint_of(whole, dict(one_replay=False)).method
    noise = np.asarray(each.crossed_noise(stage.batch["sample_id"], stage.key))
    noise = noise.reshape(BATCH, CAPTIONS, DRAWINGS, -1)
    np.testing.assert_array_equal(noise, noise[:, :1].repeat(CAPTIONS, 1))
    assert len(np.unique(noise[:, 0, :, 0])) == BATCH * DRAWINGS
    captions = np.asarray(stage.rollout["samples"]["captions"]["tokens"])
    assert (
        captions.shape[:2] == (BATCH, CAPTIONS) and len(np.unique(captions.reshape(BATCH * CAPTIONS, -1), axis=0)) > 4
    )


@pytest.mark.slow
def test_parts_and_micro_batches_change_nothing(stage, both):
    two = gradients(stage.method.loss, stage.adapters, stage.frozen, stage.rollout, stage.key, 2)
    for name in stage.trained:
        assert largest_gap(both[0][name], two[0][name]) < 1e-3, name
    method = varied(stage.method, rollout_parts=2)
    parts = jax.jit(lambda params: make_rollout(method, params, stage.frozen, stage.batch, stage.key))(stage.adapters)
    close = dict(rtol=1e-3, atol=2e-4)
    for name, leaf in trees.flatten(stage.rollout["samples"]).items():
        np.testing.assert_allclose(trees.flatten(parts["samples"])[name], leaf, **close, err_msg=name)


@pytest.mark.slow
def test_a_continued_run_ends_bit_equal_with_both_parts(config, tmp_path):
    """One step, then one more, is two steps in one go."""
    few = dict(images=1, images_during=1, samples=0, geneval_per_tag=0)
    values = changed(
        config,
        stages=("und_for_gen",),
        evaluation=few,
        und_for_gen=dict(
            method="joint", batch_size=BATCH, temperature=1.0, joint=dict(captions=CAPTIONS), flow_grpo=FLOW
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))
        run_module.run(values, tmp_path / "whole")
        run_module.run(changed(values, und_for_gen=dict(steps=1)), tmp_path / "parts")
        run_module.run(values, tmp_path / "parts")
    files = [
        {str(file.relative_to(place)): file.read_bytes() for file in sorted(place.rglob("*.safetensors"))}
        for place in (tmp_path / name / "export" for name in ("whole", "parts"))
    ]
    assert files[0] == files[1] and any("llm_lora" in name for name in files[0])
    assert any("dit_lora" in name for name in files[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data_captions=0.5), "joint.captions are all the captioner's own; data_captions is 0.5, set it to 0"),
        (dict(temperature=0.0), "joint.captions of one image must differ; temperature is 0"),
        (dict(flow_grpo=dict(window_high=9)), "joint.flow_grpo: window is 1 steps"),
        (dict(flow_grpo=dict(dense_rewards=True)), "joint.flow_grpo.dense_rewards pays steps"),
        (dict(joint=dict(captions=1)), "joint.captions is 1; it must be at least 2"),
        (dict(joint=dict(captioner=dict(aggregation="token_mean"))), "aggregation is 'token_mean'; choose one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, und_for_gen=dict(method="joint") | changes), tmp_path)
