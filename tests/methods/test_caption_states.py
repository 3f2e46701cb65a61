"""The states of a caption's own tokens as the decoder's context: after the image, masked, alone as in groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import nudged, stage_of

from uae_jax.methods.stage_settings import rollout_denoising
from uae_jax.rollouts.reconstruction import caption_states, encode_condition


@pytest.fixture(scope="module")
def captions(whole):
    """gen_for_und with a trained adapter, its sampled captions, and how images are generated."""
    stage = stage_of(whole, "gen_for_und", condition="caption_states", guidance_scale=2.0)
    parts = {**stage.frozen, "language_lora": nudged(stage.trained["language_lora"], size=0.05)}
    how = rollout_denoising(stage.method.system.model, stage.config, stage.method.sampler, stage.config.guidance_scale)
    said = jax.jit(lambda parts: stage.method.write_captions(parts, stage.batch, None, stage.key))(parts)
    return stage, parts, how, said


def _states(stage, how, batch, parts, tokens, mask):
    return jax.jit(lambda parts: caption_states(stage.method.system.model, parts, how, batch, tokens, mask))(parts)


def test_states_are_those_of_the_tokens_and_masked_after_the_end(captions):
    stage, parts, how, said = captions
    (states, mask), negative = _states(stage, how, stage.batch, parts, said.tokens, said.mask)
    width = said.tokens.shape[1]
    np.testing.assert_array_equal(mask[:, :width], said.mask)
    assert not mask[:, width:].any() and states.shape[:2] == mask.shape
    assert negative[0].shape[1] == states.shape[1]  # one compiled shape for both halves of guidance
    # what stands after the end of a caption changes nothing that is not masked
    changed = jnp.where(said.mask, said.tokens, 5)
    (again, _), _ = _states(stage, how, stage.batch, parts, changed, said.mask)
    shown = np.asarray(mask)[..., None]
    np.testing.assert_allclose(np.asarray(again) * shown, np.asarray(states) * shown, atol=1e-5)


def test_they_see_the_image_and_the_text_alone_does_not(captions):
    stage, parts, how, said = captions
    model, group = stage.method.system.model, stage.config.group_size
    turned = {name: jnp.roll(value, 1, axis=0) if name == "patches" else value for name, value in stage.batch.items()}
    first, other = (_states(stage, how, batch, parts, said.tokens, said.mask)[0] for batch in (stage.batch, turned))
    shown = np.asarray(first[1])[..., None]
    assert np.abs((np.asarray(first[0]) - np.asarray(other[0])) * shown).max() > 1e-3
    lengths = jnp.sum(said.mask, -1, dtype=jnp.int32) - said.finished
    policy = dataclasses.replace(how, condition="policy")
    text, _ = jax.jit(lambda parts: encode_condition(model, parts, policy, said.tokens, lengths))(parts)
    assert text[0].shape == first[0].shape and np.abs(np.asarray(text[0]) - np.asarray(first[0])).max() > 1e-2
    assert len(said.tokens) == len(stage.batch["patches"]) * group


def test_a_caption_has_the_same_states_alone_and_in_its_group(captions):
    stage, parts, how, said = captions
    group = stage.config.group_size
    together, _ = _states(stage, how, stage.batch, parts, said.tokens, said.mask)
    alone, _ = _states(stage, how, stage.batch, parts, said.tokens[::group], said.mask[::group])
    shown = np.asarray(alone[1])[..., None]
    np.testing.assert_allclose(np.asarray(alone[0]) * shown, np.asarray(together[0])[::group] * shown, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage_name, more", [("gen_for_und", {}), ("und_for_gen", dict(data_captions=0.5))])
def test_a_stage_trains_with_them(whole, stage_name, more):
    stage = stage_of(
        whole,
        stage_name,
        condition="caption_states",
        **({} if stage_name == "gen_for_und" else dict(data_captions=0.5)),
    )
    state = stage.state()
    _, metrics = stage.step(state)(state, stage.frozen, stage.batch, stage.key)
    assert float(metrics["grad_norm"]) > 0 and np.isfinite(float(metrics["loss"]))
