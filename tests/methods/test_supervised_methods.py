"""Pretraining and cold start: what their losses and gradients must be, on a random model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import largest_gap, stage_of, varied

from uae_jax.methods import cold_start
from uae_jax.models import uae
from uae_jax.training.step import step_key


@pytest.fixture(scope="module")
def drawn(whole):
    """The pieces of pretraining with half of the captions dropped, and one rollout."""
    stage = stage_of(whole, "pretrain", condition_dropout=0.5)
    key = step_key(stage.key, "rollout", 0)
    return stage, jax.jit(stage.method.rollout)(stage.trained, stage.frozen, stage.batch, key)["samples"]


def test_dropped_captions_are_the_negative_prompt(whole, drawn):
    stage, samples = drawn
    template = whole.system.model.template
    around = len(template.prefix) + len(template.suffix)
    assert len(template.negative) == 2
    lengths = np.asarray(samples["mask"]).sum(-1) - around
    full = np.asarray(stage.batch["caption_mask"]).sum(-1) - 1
    dropped = lengths != full
    assert 0 < dropped.sum() < len(dropped) and set(lengths[dropped]) == {2}
    rows = np.asarray(samples["hidden"])[dropped][:, : 2 + around]
    np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape), atol=1e-5)
    kept = np.asarray(samples["hidden"])[~dropped][0, : 2 + around]
    assert np.abs(kept - rows[0]).max() > 1e-2


def test_the_frozen_encoders_see_a_part_of_the_batch_at_a_time(drawn):
    stage, samples = drawn
    rows = len(stage.batch["sample_id"])
    temporaries = {}
    for parts in (1, rows):
        rollout = varied(stage.method, micro_batches=parts).rollout
        arguments = stage.trained, stage.frozen, stage.batch, step_key(stage.key, "rollout", 0)
        compiled = jax.jit(rollout).lower(*arguments).compile()
        temporaries[parts] = compiled.memory_analysis().temp_size_in_bytes
        found = compiled(*arguments)["samples"]
        assert (
            largest_gap(
                {name: found[name] for name in ("latents", "hidden")},
                {name: samples[name] for name in ("latents", "hidden")},
            )
            < 1e-5
        )
        np.testing.assert_array_equal(found["mask"], samples["mask"])
        np.testing.assert_array_equal(found["sample_id"], samples["sample_id"])
    assert temporaries[rows] < 1.5 / rows * temporaries[1]


def test_an_adapter_at_its_start_has_the_loss_of_the_whole_transformer(whole, drawn):
    stage, samples = drawn
    adapted = stage_of(whole, "pretrain", condition_dropout=0.5, train="lora", train_projector=False, lora_rank=2)
    assert set(adapted.trained) == {"transformer_lora"} and "transformer" in adapted.frozen

    def loss(trained, pieces=adapted):
        total, count, _ = pieces.method.loss(trained, pieces.frozen, {"samples": samples}, stage.key)
        return total / count

    whole_loss = float(loss(stage.trained, stage))
    value, gradient = jax.jit(jax.value_and_grad(loss))(adapted.trained)
    assert float(value) == pytest.approx(whole_loss, rel=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 0
    moved = jax.tree.map(lambda leaf, slope: leaf - 1e-2 * slope, adapted.trained, gradient)
    assert float(loss(moved)) < whole_loss


@pytest.mark.trap(32)
def test_a_perfect_predictor_has_no_loss(drawn, monkeypatch):
    stage, samples = drawn

    def exact(model, parts, latents, sigma, context, *, policy):
        del model, parts, context, policy
        return (latents - samples["latents"]) / sigma[:, None, None, None]

    def loss() -> float:
        total, count, _ = stage.method.loss(stage.trained, stage.frozen, {"samples": samples}, stage.key)
        return float(total / count)

    monkeypatch.setattr(uae, "velocity", exact)
    assert loss() < 1e-9
    monkeypatch.setattr(uae, "velocity", lambda *args, **named: exact(*args, **named) + 0.5)
    assert loss() == pytest.approx(0.25, rel=1e-4)


def _value_and_gradient(whole, model=None, **changes):
    """Mean loss and gradient of cold start as a function of the trained parts alone."""
    stage = stage_of(whole, "cold_start", clamp="none", **changes)
    system = dataclasses.replace(whole.system, model=model or whole.system.model)
    method = dataclasses.replace(stage.method, system=system)

    def mean(params):
        total, count, _ = method.loss(params, stage.frozen, {"samples": stage.batch}, stage.key)
        return total / count

    return stage.trained, jax.jit(jax.value_and_grad(mean))


@pytest.fixture(scope="module")
def cold(whole):
    trained, function = _value_and_gradient(whole, guidance_scale=2.0)
    return trained, function, *function(trained)


@pytest.mark.trap(33)
@pytest.mark.slow
def test_cold_start_gradient_is_the_slope_of_its_loss(cold):
    trained, function, _, gradient = cold
    trained, gradient = jax.device_get((trained, gradient))
    slope = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    for name in trained:
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[name])), name
    rng = np.random.default_rng(0)
    # half along the gradient, half at random: along a random direction alone float32 drowns the slope
    direction = jax.tree.map(lambda g: g / slope + rng.standard_normal(g.shape).astype(np.float32) / 300, gradient)
    size = 4e-3
    ends = [
        function(jax.tree.map(lambda p, d: p + np.float32(sign * size) * d, trained, direction))[0] for sign in (1, -1)
    ]
    expected = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
    assert (float(ends[0]) - float(ends[1])) / (2 * size) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_image_encoders_are_recomputed_where_the_transformer_is(whole, monkeypatch, remat):
    model, seen, mixed_reward = whole.system.model, [], cold_start.mixed_reward

    def watched(config, encoders, *more):
        seen.extend(encoder.remat for encoder in encoders)
        return mixed_reward(config, encoders, *more)

    monkeypatch.setattr(cold_start, "mixed_reward", watched)
    transformer = dataclasses.replace(model.transformer, remat=remat)
    model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, transformer=transformer))
    trained, function = _value_and_gradient(whole, model)
    jax.eval_shape(function, trained)
    assert seen and set(seen) == {remat == "full"}


@pytest.mark.trap(33)
@pytest.mark.slow
def test_recomputing_layers_changes_no_gradient(whole, cold):
    trained, _, value, gradient = cold
    model = whole.system.model
    captioner, transformer = model.captioner.using(remat="full"), dataclasses.replace(model.transformer, remat="full")
    decoder = dataclasses.replace(model.decoder, captioner=captioner, transformer=transformer)
    again = dataclasses.replace(model, captioner=captioner, decoder=decoder)
    other_value, other = _value_and_gradient(whole, again, guidance_scale=2.0)[1](trained)
    assert float(other_value) == pytest.approx(float(value), rel=1e-5)
    assert largest_gap(gradient, other) < 1e-4


@pytest.mark.slow
def test_caption_states_are_another_condition_and_train_too(whole, cold):
    trained, _, value, gradient = cold
    other_value, other = _value_and_gradient(whole, guidance_scale=2.0, condition="caption_states")[1](trained)
    assert abs(float(other_value) - float(value)) > 1e-5
    leaves = jax.tree.leaves(other)
    assert all(np.isfinite(leaf).all() for leaf in leaves) and largest_gap(gradient, other) > 1e-2
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(other["projector"]))
