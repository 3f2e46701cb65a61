"""What must hold of the two RL steps whatever the weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, largest_gap, make_run, nudged, stage_of, varied

from uae_jax.methods.gen_for_und import PROMPT_FIELDS
from uae_jax.models.language.generate import Completion
from uae_jax.rollouts.captioning import encode_batch_images


@pytest.fixture(scope="module")
def captioner(whole):
    """gen_for_und: two steps of one compiled program."""
    stage = stage_of(whole, "gen_for_und")
    step, first = stage.step(stage.state()), stage.state()
    second, metrics = step(first, stage.frozen, stage.batch, stage.key)
    moved = jax.tree.map(np.asarray, second.params)
    third, again = step(second, stage.frozen, stage.batch, stage.key)
    return (
        stage,
        step,
        moved,
        {name: float(value) for name, value in metrics.items()},
        {name: float(value) for name, value in again.items()},
    )


@pytest.mark.trap(1, 34)
def test_first_ratio_is_exactly_one_and_kl_exactly_zero(captioner):
    *_, metrics, again = captioner
    assert metrics["ratio_deviation_max"] == 0.0 and metrics["kl"] == 0.0
    assert metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0.0
    assert metrics["grad_norm"] > 0 and metrics["reward_std"] > 0
    for found in (metrics, again):  # of the second step with an adapter that has moved
        assert 0 < found["log_prob_gap"] <= found["log_prob_gap_max"] < 1e-4
    assert again["kl"] > 0  # the rollout of the second step is scored against a reference that did not move


@pytest.mark.trap(34)
@pytest.mark.slow
def test_rollouts_of_8_bits_are_scored_by_the_model_itself(whole, captioner):
    stage = stage_of(whole, "gen_for_und", rollout_weights="int8")
    state = stage.state()
    _, metrics = stage.step(state)(state, stage.frozen, stage.batch, stage.key)
    exact = captioner[3]
    assert float(metrics["ratio_deviation_max"]) == 0.0 and float(metrics["kl"]) == 0.0
    assert exact["log_prob_gap_max"] < 1e-4 < 1e-3 < float(metrics["log_prob_gap"]) < 0.5


@pytest.mark.trap(14, 34)
def test_only_the_adapter_is_trained_and_it_moves(captioner):
    stage, _, moved, *_ = captioner
    assert set(stage.trained) == set(moved) == {"language_lora"}
    assert largest_gap(stage.trained["language_lora"], moved["language_lora"]) > 0


@pytest.mark.trap(34)
def test_the_step_was_compiled_once(captioner):
    _, step, *_ = captioner
    assert step._cache_size() == 1


def _reconstructions(stage, method, completion):
    parts = {**stage.frozen, **stage.trained}
    images = encode_batch_images(method.system.model, parts, stage.batch)
    pixels = method.reconstruct(parts, stage.batch, images, completion, stage.key)
    return np.asarray(pixels).reshape(len(stage.batch["pixels"]), stage.config.group_size, -1)


@pytest.mark.trap(25, 34)
@pytest.mark.slow
def test_shared_noise_gives_equal_captions_equal_images(captioner):
    stage = captioner[0]
    rows = len(stage.batch["pixels"]) * stage.config.group_size
    tokens = jnp.full((rows, stage.config.max_new_tokens), 20, jnp.int32)
    same = Completion(tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape), jnp.zeros(rows, bool))
    shared = _reconstructions(stage, stage.method, same)
    # not to the last bit: how a product is cut into blocks may depend on the row
    np.testing.assert_allclose(shared, np.broadcast_to(shared[:, :1], shared.shape), atol=1e-5)
    separate = _reconstructions(stage, varied(stage.method, shared_noise=False), same)
    assert np.abs(separate - separate[:, :1]).max() > 1e-3


@pytest.mark.trap(24, 34)
def test_captions_follow_from_sample_ids_and_not_from_the_batch(captioner):
    stage = captioner[0]
    parts = {**stage.frozen, **stage.trained}
    images = encode_batch_images(stage.method.system.model, parts, stage.batch)
    whole = stage.method.write_captions(parts, stage.batch, images, stage.key).tokens
    order = np.arange(len(images))[::-1]
    turned = {name: value[order] for name, value in stage.batch.items()}
    other = stage.method.write_captions(parts, turned, images[order], stage.key).tokens
    group = stage.config.group_size
    np.testing.assert_array_equal(
        np.asarray(whole).reshape(len(order), group, -1)[order], np.asarray(other).reshape(len(order), group, -1)
    )


@pytest.mark.trap(13, 34)
def test_a_trained_adapter_reaches_the_rollout_and_leaves_the_reference(captioner):
    stage = captioner[0]
    parts = {**stage.frozen, "language_lora": nudged(stage.trained["language_lora"], size=0.3)}
    images = encode_batch_images(stage.method.system.model, parts, stage.batch)
    new = stage.method.write_captions(parts, stage.batch, images, stage.key)
    old = stage.method.write_captions({**stage.frozen, **stage.trained}, stage.batch, images, stage.key)
    assert np.any(np.asarray(new.tokens) != np.asarray(old.tokens))
    samples = {name: stage.batch[name] for name in PROMPT_FIELDS} | {
        "image_embeds": images,
        "tokens": new.tokens.reshape(len(images), stage.config.group_size, -1),
        "mask": new.mask.reshape(len(images), stage.config.group_size, -1),
    }
    score = stage.method.score_captions
    base = score({**stage.frozen, **stage.trained}, samples, trained=False).log_probs
    np.testing.assert_array_equal(base, score(parts, samples, trained=False).log_probs)
    np.testing.assert_array_equal(base, score({**stage.frozen, **stage.trained}, samples, trained=True).log_probs)
    sampled = np.asarray(new.log_probs).reshape(base.shape)
    np.testing.assert_allclose(score(parts, samples, trained=True).log_probs, sampled, atol=1e-4)


@pytest.mark.trap(34)
@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(group_size=1), "config.gen_for_und.group_size is 1; it must be at least 2"),
        (dict(temperature=0.0), "config.gen_for_und.temperature is 0.0; it must be above 0"),
        (dict(dual_clip=0.5), "config.gen_for_und.dual_clip is 0.5; it must be above 1, or 0 for none"),
        (dict(objective="sft"), "config.gen_for_und.objective is 'sft'; choose one of grpo, supervised"),
    ],
)
def test_settings_that_cannot_work_fail_before_anything_runs(config, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, gen_for_und=setting), tmp_path)


@pytest.mark.trap(34, 35)
@pytest.mark.slow
def test_two_updates_of_a_rollout_move_the_ratio(whole):
    stage = stage_of(whole, "und_for_gen", flow_grpo=dict(updates_per_rollout=2))
    first = stage.state()
    step = stage.step(first)
    state, metrics = step(first, stage.frozen, stage.batch, stage.key)
    metrics = {name: float(value) for name, value in metrics.items()}
    assert metrics["log_prob_gap"] < 1e-6
    assert metrics["ratio_deviation"] > 1e-6  # of the second update: old and new parameters are not the same buffers
    assert set(state.params) == {"transformer_lora"} and int(state.updates) == 2
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.trap(21, 34)
def test_flow_ratio_is_one_before_the_update(whole):
    stage = stage_of(whole, "und_for_gen", flow_grpo=dict(updates_per_rollout=1))
    first = stage.state()
    _, metrics = stage.step(first)(first, stage.frozen, stage.batch, stage.key)
    assert float(metrics["ratio_deviation_max"]) == 0.0
    for name in ("velocity_gap", "log_prob_gap"):
        assert 0 <= float(metrics[name]) <= float(metrics[f"{name}_max"]) < 1e-5
    assert float(metrics["kl"]) < 1e-10 and float(metrics["grad_norm"]) > 0


@pytest.mark.trap(34)
@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(group_size=1), "config.und_for_gen.group_size is 1; it must be at least 2"),
        (dict(flow_grpo=dict(step_rule="euler")), "flow_grpo.step_rule is 'euler'; choose one of sde, dance, cps"),
        (dict(flow_grpo=dict(step_rule="cps", grpo_guard=True)), "flow_grpo.grpo_guard needs the Gaussian"),
        (dict(flow_grpo=dict(window_high=9)), "flow_grpo.window is 1 steps in .0, 9.; it does not fit"),
        (dict(flow_grpo=dict(window_low=2)), "flow_grpo.window is 1 steps in .2, 2.; it does not fit"),
    ],
)
def test_flow_settings_that_cannot_work_fail_before_anything_runs(config, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, und_for_gen=setting), tmp_path)


@pytest.mark.trap(34)
@pytest.mark.slow
def test_the_second_update_of_an_nft_rollout_is_off_policy(whole):
    stage = stage_of(whole, "und_for_gen", method="nft", nft=dict(updates_per_rollout=2, kl_weight=0.1))
    first = stage.state()
    state, metrics = stage.step(first)(first, stage.frozen, stage.batch, stage.key)
    assert float(metrics["velocity_shift"]) > 0.0 and float(metrics["kl"]) > 0.0
    assert set(state.params) == {"transformer_lora"} and int(state.updates) == 2


@pytest.mark.trap(34)
def test_nft_begins_at_the_reference_and_rolls_out_by_a_policy_that_lags(whole):
    own = dict(updates_per_rollout=1, kl_weight=0.1, old_decay=0.5, old_decay_rate=10.0)
    stage = stage_of(whole, "und_for_gen", method="nft", nft=own)
    state = stage.state()
    step, start = stage.step(state), jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, stage.frozen, stage.batch, stage.key)
    assert float(metrics["kl"]) < 1e-10 and float(metrics["velocity_shift"]) == 0.0 and float(metrics["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, state.old, state.params)  # the decay of step 0 is 0
    first = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, stage.frozen, stage.batch, stage.key)
    assert float(metrics["velocity_shift"]) == 0.0 and largest_gap(start, first) > 0
    half = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * np.asarray(new), first, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state.old, half)
    _, metrics = step(state, stage.frozen, stage.batch, stage.key)
    assert float(metrics["velocity_shift"]) > 0.0  # the policy has left the one that made the rollout


@pytest.mark.trap(34)
@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(method="ppo"), "config.und_for_gen.method is 'ppo'; choose one of flow_grpo, nft"),
        (dict(nft=dict(guidance_scale=3.0)), "config.und_for_gen.nft.guidance_scale does not exist"),
        (dict(nft=dict(levels=0)), "config.und_for_gen.nft.levels is 0; it must be at least 1"),
        (dict(data_captions=1.5), "data_captions is 1.5; it must be at least 0, at most 1"),
    ],
)
def test_nft_settings_that_cannot_work_fail_before_anything_runs(config, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, und_for_gen=dict(method="nft") | setting), tmp_path)
