"""What must hold of Janus whatever its numbers: caches, padding, guidance, and which table is read where."""

import dataclasses
import functools

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from janus_pieces import CELLS, CONFIG

from uae_jax.models.janus import drawing, model
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.lora import init_lora

GROUP, SCALE, TEMPERATURE = 2, 3.0, 0.9


@pytest.fixture(scope="module")
def params():
    return pieces.small_params()


@pytest.fixture(scope="module")
def adapter(params):
    zero = init_lora(jax.random.key(1), params["language"], lm.ADAPTER_PATTERN, 2)
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), zero)


def prompts() -> tuple[np.ndarray, np.ndarray]:
    return pieces.right_padded(pieces.drawing_prompts())


@functools.partial(jax.jit, static_argnames=("config", "group", "scale", "packed"))
def draw(params, adapter, ids, mask, keys, *, config=CONFIG, group=GROUP, scale=SCALE, packed=False):
    prefix = drawing.drawing_prefix(config, params, adapter, ids, mask, guided=scale != 1)
    sampling = SamplingConfig(TEMPERATURE)
    return drawing.draw(
        config, params, adapter, prefix, keys, guidance_scale=scale, sampling=sampling, group=group, packed=packed
    )


@functools.partial(jax.jit, static_argnames=("config", "group", "scale", "chunk"))
def score(params, adapter, ids, mask, tokens, *, config=CONFIG, group=GROUP, scale=SCALE, chunk=5):
    prefix = drawing.drawing_prefix(config, params, adapter, ids, mask, guided=scale != 1)
    return drawing.drawing_log_probs(
        config,
        params,
        adapter,
        prefix,
        tokens,
        guidance_scale=scale,
        temperature=TEMPERATURE,
        group=group,
        chunk=chunk,
        with_entropy=True,
    )


def keys(count: int = 3 * GROUP):
    return jax.random.split(jax.random.key(7), count)


def assert_close(found, expected, tolerance: float = 1e-5):
    """Largest error relative to the largest value."""
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() <= tolerance * np.abs(np.asarray(expected)).max()


@pytest.fixture(scope="module")
def drawn(params, adapter):
    return draw(params, adapter, *prompts(), keys())


@pytest.mark.trap(41)
def test_drawing_with_a_cache_equals_replay(params, adapter, drawn):
    found = score(params, adapter, *prompts(), drawn.tokens)
    assert len(np.unique(drawn.tokens)) > 30
    assert_close(found.log_probs, drawn.log_probs)
    whole = score(params, adapter, *prompts(), drawn.tokens, chunk=CELLS)
    assert_close(whole.log_probs, found.log_probs)
    assert_close(whole.entropy, found.entropy)


def test_the_form_that_gpus_decode_with_draws_the_same(params, adapter, drawn):
    packed = draw(params, adapter, *prompts(), keys(), packed=True)
    np.testing.assert_array_equal(packed.tokens, drawn.tokens)
    assert_close(packed.log_probs, drawn.log_probs)


@pytest.mark.trap(41, 51)
def test_a_caption_with_a_cache_equals_replay_and_nothing_after_its_end_counts(params, adapter):
    ids, mask = pieces.right_padded(pieces.caption_prompts())
    batch = {"prompt_ids": ids, "prompt_mask": mask, "pixels": pieces.pixels()}

    @jax.jit
    def run(params, adapter, batch):
        prefix = model.prompt_prefix(CONFIG, params, adapter, batch)
        said = generate(
            CONFIG,
            params,
            adapter,
            prefix,
            keys(12),
            max_new_tokens=24,
            stop_ids=tuple(range(40)),  # a quarter of the vocabulary, so that captions end at different lengths
            sampling=SamplingConfig(TEMPERATURE),
            group=4,
        )
        wild = jnp.where(said.mask, said.tokens, 99)
        score = functools.partial(lm.completion_log_probs, CONFIG, params, adapter, prefix, temperature=TEMPERATURE)
        frozen = score(said.tokens, said.mask, frozen_head=True).log_probs
        return said, score(said.tokens, said.mask).log_probs, score(wild, said.mask).log_probs, frozen

    said, replayed, after_the_end, frozen = run(params, adapter, batch)
    assert_close(frozen, replayed)
    lengths = np.asarray(said.mask).sum(1)
    assert len(set(lengths.tolist())) > 3 and said.finished.any()
    assert_close(replayed, said.log_probs)
    np.testing.assert_array_equal(after_the_end, replayed)
    assert (np.asarray(replayed)[~np.asarray(said.mask)] == 0).all()
    assert (np.asarray(said.tokens)[~np.asarray(said.mask)] == pieces.PAD).all()


@pytest.mark.trap(43, 44)
def test_a_short_prompt_in_a_padded_batch_draws_as_it_does_alone(params, adapter, drawn):
    """Its unconditional half has the length of its own prompt, and keeps the first and the last token."""
    ids, mask = prompts()
    for row, prompt in enumerate(pieces.drawing_prompts()):
        without = drawing.unconditional(CONFIG, jnp.asarray(ids), jnp.asarray(mask))[row, : len(prompt)]
        assert without.tolist() == [pieces.BOS, *[pieces.PAD] * (len(prompt) - 2), pieces.BEGIN]
    row = 1
    count = len(pieces.drawing_prompts()[row])
    assert count < ids.shape[1]
    own = slice(row * GROUP, (row + 1) * GROUP)
    alone = draw(params, adapter, ids[row : row + 1, :count], mask[row : row + 1, :count], keys()[own])
    np.testing.assert_array_equal(alone.tokens, drawn.tokens[own])
    assert_close(alone.log_probs, drawn.log_probs[own])


@pytest.mark.trap(43)
def test_the_unconditional_half_depends_on_the_length_of_the_prompt(params):
    """Padding between the first and the last token is attended to."""
    inside = ([9, 9, 9], [9] * 8, [50, 7, 9])
    ids, mask = pieces.right_padded([[pieces.BOS, *words, pieces.BEGIN] for words in inside])
    prefix = jax.jit(functools.partial(drawing.drawing_prefix, CONFIG))(params, None, ids, mask)
    short, long, other = np.asarray(prefix.last_hidden)[1::2]
    assert np.abs(short - long).max() > 1e-2
    assert_close(other, short)  # and on nothing else


@pytest.mark.trap(45)
def test_every_token_of_a_full_drawing_counts(params, adapter, drawn):
    """A drawing has no end token: the last one is scored as the first, and nothing says truncated."""
    assert drawn._fields == ("tokens", "log_probs") and drawn.tokens.shape == (3 * GROUP, CELLS)
    assert (np.asarray(drawn.log_probs) < 0).all()
    other = drawn.tokens.at[:, -1].set((drawn.tokens[:, -1] + 1) % 64)
    found, changed = (score(params, adapter, *prompts(), tokens).log_probs for tokens in (drawn.tokens, other))
    assert_close(changed[:, :-1], found[:, :-1])
    assert (np.abs(changed - found)[:, -1] > 1e-3).all()


def test_guidance_of_one_is_the_conditional_distribution(params, adapter, drawn):
    ids, mask = prompts()
    conditional = score(params, adapter, ids, mask, drawn.tokens, scale=1).log_probs

    @jax.jit
    def guided_by_one(params, adapter, tokens):
        prefix = drawing.drawing_prefix(CONFIG, params, adapter, ids, mask)
        return drawing.drawing_log_probs(
            CONFIG, params, adapter, prefix, tokens, guidance_scale=1.0, temperature=TEMPERATURE, group=GROUP
        ).log_probs

    assert_close(guided_by_one(params, adapter, drawn.tokens), conditional)
    alone = draw(params, adapter, ids, mask, keys(), scale=1)
    assert_close(score(params, adapter, ids, mask, alone.tokens, scale=1).log_probs, alone.log_probs)


@pytest.mark.trap(50)
@pytest.mark.parametrize("name", ["language/head/kernel", "language/embedding/table", "vq/codebook/table"])
def test_scores_of_image_tokens_read_neither_text_head_nor_codebook(params, adapter, drawn, name):
    changed = pieces.replaced(params, name, lambda leaf: leaf + jax.random.normal(jax.random.key(5), leaf.shape))
    found, other = (score(tree, adapter, *prompts(), drawn.tokens).log_probs for tree in (params, changed))
    if name == "language/embedding/table":
        assert float(jnp.abs(found - other).max()) > 1e-2  # the prompt reads it: the test sees a table that matters
    else:
        np.testing.assert_array_equal(found, other)


@pytest.mark.trap(47)
def test_image_tokens_are_read_from_their_own_table(params, adapter, drawn):
    changed = pieces.replaced(params, "generation/embedding/table", lambda leaf: leaf[::-1])
    found, other = (score(tree, adapter, *prompts(), drawn.tokens).log_probs for tree in (params, changed))
    np.testing.assert_array_equal(found[:, 0], other[:, 0])  # no image token has been read yet
    assert float(jnp.abs(found - other)[:, 1:].max()) > 1e-2
    jax.tree.map(np.testing.assert_array_equal, params["vq"], changed["vq"])  # all that pixels are made of


def test_a_picture_reaches_the_caption_and_its_size_is_checked(params):
    ids, mask = pieces.right_padded(pieces.caption_prompts())
    batch = {"prompt_ids": ids, "prompt_mask": mask}
    run = jax.jit(lambda params, batch: model.prompt_prefix(CONFIG, params, None, batch).last_hidden)
    one, other = (run(params, batch | {"pixels": pieces.pixels(seed=seed)}) for seed in (1, 2))
    assert float(jnp.abs(one - other).max()) > 1e-2
    with pytest.raises(ValueError, match="Janus reads images of shape"):
        model.encode_images(CONFIG, params, jnp.zeros((1, 16, 16, 3)))


def test_gradients_reach_the_adapter_through_both_halves_and_the_prefix(params, adapter, drawn):
    @jax.jit
    def gradient(adapter, scale):
        prefix = drawing.drawing_prefix(CONFIG, params, adapter, *map(jnp.asarray, prompts()))

        def total(adapter, prefix):
            return drawing.drawing_log_probs(
                CONFIG, params, adapter, prefix, drawn.tokens, guidance_scale=scale, group=GROUP
            ).log_probs.sum()

        return jax.grad(total, argnums=(0, 1), allow_int=True)(adapter, prefix)

    own, through = gradient(adapter, SCALE)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(own))
    halves = np.abs(np.asarray(through.last_hidden)).sum(1)
    assert (halves > 0).all()
    without, through = gradient(adapter, 1.0)
    assert (np.abs(np.asarray(through.last_hidden)).sum(1)[1::2] < 1e-6).all()  # the unconditional half has no weight


def test_number_of_keys_is_checked(params):
    prefix = lm.Prefix(None, jnp.zeros(6, jnp.int32), None)
    with pytest.raises(ValueError, match="4 images do not belong to 6 rows"):
        drawing.draw(CONFIG, params, None, prefix, keys(4), group=1)


@pytest.mark.trap(41)
def test_half_precision_keeps_logits_and_scores_in_float32(params, adapter, drawn):
    half = dataclasses.replace(CONFIG, text=CONFIG.text.using(dtype="bfloat16"))
    found = score(params, adapter, *prompts(), drawn.tokens, config=half)
    assert found.log_probs.dtype == jnp.float32
    gap = np.abs(found.log_probs - score(params, adapter, *prompts(), drawn.tokens).log_probs)
    assert 0 < gap.mean() < 0.2
    cached = draw(params, adapter, *prompts(), keys(), config=half)
    replayed = score(params, adapter, *prompts(), cached.tokens, config=half)
    assert np.abs(cached.log_probs - replayed.log_probs).mean() < 0.2
