"""Answers by log-probabilities: they equal a step-by-step computation, and padding changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import nudged

from uae_jax.models import uae
from uae_jax.models.language import model as lm
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.rollouts.answering import NO_OPTION, chosen_option, option_scores
from uae_jax.rollouts.captioning import encode_batch_images

QUESTIONS = 3


@pytest.fixture(scope="module")
def asked(whole):
    rows = [whole.rows.image_fields(whole.source[index].image) for index in range(QUESTIONS)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    rng = np.random.default_rng(0)
    tokens = rng.integers(11, 40, (QUESTIONS, 4, 3)).astype(np.int32)
    mask = np.arange(3) < rng.integers(1, 4, (QUESTIONS, 4, 1))
    option = np.array([[0, 1, 1, 2]] * QUESTIONS, np.int32)
    return batch, tokens, mask, option


def stepwise(model, parts, batch, tokens):
    """The sum of log-probabilities of each text `[b, s, t]`, one whole sequence at a time."""
    config = model.captioner
    params, adapter = uae.captioner_weights(parts, policy=True)
    found = np.zeros(tokens.shape)
    images = encode_batch_images(model, parts, batch)
    for b, s in np.ndindex(tokens.shape[:2]):
        length = int(batch["prompt_mask"][b].sum())
        ids = jnp.concatenate([batch["prompt_ids"][b, :length], tokens[b, s]])[None]
        rest = batch["prompt_next"][b] + jnp.arange(tokens.shape[2])
        positions = jnp.concatenate([batch["prompt_positions"][b, :length], jnp.stack([rest] * 3, -1)])[None]
        mask = jnp.ones(ids.shape, bool)
        embeds = lm.embed_prompt(config, params, ids, mask, images[b : b + 1])
        hidden = lm.hidden_states(config, params, adapter, embeds, positions, mask)
        said = jax.nn.log_softmax(lm.logits(config, params, hidden[0, length - 1 : -1]))
        found[b, s] = np.take_along_axis(np.asarray(said), tokens[b, s][:, None], 1)[:, 0]
    return found


@pytest.mark.slow
def test_an_option_has_the_probability_of_its_texts_under_the_policy(whole, asked):
    batch, tokens, mask, option = asked
    parts = {**whole.parts, "language_lora": nudged(whole.parts["language_lora"])}
    scores = np.asarray(option_scores(whole.system.model, parts, batch, tokens, mask, mask, option, 4))
    texts = np.where(mask, stepwise(whole.system.model, parts, batch, tokens), 0).sum(-1)
    expected = np.stack([texts[:, 0], np.logaddexp(texts[:, 1], texts[:, 2]), texts[:, 3]], 1)
    np.testing.assert_allclose(scores[:, :3], expected, atol=2e-5)
    assert (scores[:, 3] == -np.inf).all()  # an option that this question does not have
    np.testing.assert_array_equal(chosen_option(scores), expected.argmax(1))
    without = option_scores(whole.system.model, whole.parts, batch, tokens, mask, mask, option, 4)
    assert np.abs(np.asarray(without)[:, :3] - expected).max() > 1e-3  # the adapter is read


def test_a_letter_is_scored_from_the_prompt_alone(whole, asked):
    batch, *_ = asked
    letters = np.array([[[20], [21], [22], [0]]] * QUESTIONS, np.int32)
    option = np.array([[0, 1, 2, NO_OPTION]] * QUESTIONS, np.int32)
    score = lambda batch: option_scores(
        whole.system.model, whole.parts, batch, letters, letters >= 0, letters >= 0, option, options=4
    )
    found = np.asarray(score(batch))
    params, adapter = uae.captioner_weights(whole.parts, policy=True)
    prefix = qwen.prompt_prefix(whole.system.model.captioner, params, adapter, batch)
    said = jax.nn.log_softmax(lm.logits(whole.system.model.captioner, params, prefix.last_hidden))
    np.testing.assert_allclose(found[:, :3], np.asarray(said)[:, 20:23], atol=1e-5)
    assert (found[:, 3] == -np.inf).all() and (np.asarray(chosen_option(found)) < 3).all()


def test_given_tokens_are_read_and_do_not_count(whole, asked):
    batch, tokens, mask, option = asked
    whole_mask = np.ones_like(mask)
    counted = np.arange(3) >= np.array([1, 0, 2, 1])[:, None] + np.zeros((QUESTIONS, 1, 1), int)
    option = np.array([[0, 1, 2, 3]] * QUESTIONS, np.int32)
    scores = option_scores(whole.system.model, whole.parts, batch, tokens, whole_mask, counted, option, 4)
    each = stepwise(whole.system.model, whole.parts, batch, tokens)
    np.testing.assert_allclose(scores, np.where(counted, each, 0).sum(-1), atol=2e-5)


def test_padding_of_prompt_patches_and_texts_changes_nothing(whole, asked):
    batch, tokens, mask, option = asked
    score = jax.jit(lambda *arguments: option_scores(whole.system.model, whole.parts, *arguments, options=4))
    plain = np.asarray(score(batch, tokens, mask, mask, option))[:, :3]

    def longer(name, value):
        room = {"prompt_ids": 9, "prompt_mask": 9, "prompt_positions": 9}.get(name, 16 if "patch" in name else 0)
        fill = -1 if name in ("patch_windows", "patch_images") else 0
        widths = [(0, 0), (0, room), *[(0, 0)] * (value.ndim - 2)] if room else [(0, 0)] * value.ndim
        return np.pad(value, widths, constant_values=fill)

    padded = {name: longer(name, value) for name, value in batch.items()}
    assert padded["patches"].shape[1] == batch["patches"].shape[1] + 16
    more = [np.pad(value, [(0, 0), (0, 2), (0, 5)]) for value in (tokens, mask, mask)]
    more.append(np.pad(option, [(0, 0), (0, 2)], constant_values=NO_OPTION))
    np.testing.assert_allclose(np.asarray(score(padded, *more))[:, :3], plain, atol=1e-5)
