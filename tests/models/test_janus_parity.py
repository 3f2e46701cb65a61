"""Janus against transformers: a random model is saved there, read through our loader, and compared part by part."""

import functools

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from janus_pieces import CELLS, GUIDANCE, relative

from uae_jax.models.janus import drawing, model, vq, weights
from uae_jax.models.language import model as lm
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig

GREEDY, NEW = SamplingConfig(temperature=0.0), 8
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    theirs, folder = pieces.build(), tmp_path_factory.mktemp("janus")
    theirs.save_pretrained(folder)
    return theirs, *weights.load(folder)


@pytest.fixture(scope="module")
def batch():
    """Three prompts of different lengths with an image each, right-padded with the image's own id."""
    ids, mask = pieces.right_padded(pieces.caption_prompts(), fill=pieces.IMAGE)
    return {"prompt_ids": jnp.asarray(ids), "prompt_mask": jnp.asarray(mask), "pixels": jnp.asarray(pieces.pixels())}


def test_image_embeddings_equal_transformers(saved, batch):
    theirs, config, params = saved
    ours = jax.jit(functools.partial(model.encode_images, config))(params, batch["pixels"])
    with torch.no_grad():
        expected = theirs.model.get_image_features(pieces.for_torch(pieces.pixels())).pooler_output
    assert relative(ours, expected) < TOLERANCE


def test_caption_logits_and_greedy_tokens_equal_transformers_in_a_padded_batch(saved, batch):
    theirs, config, params = saved

    @jax.jit
    def caption(params, batch):
        prefix = model.prompt_prefix(config, params, None, batch)
        keys = jax.random.split(jax.random.key(0), 3)
        stops = config.stop_token_ids
        said = generate(config, params, None, prefix, keys, max_new_tokens=NEW, stop_ids=stops, sampling=GREEDY)
        return lm.logits(config, params, prefix.last_hidden), said

    logits, ours = caption(params, batch)
    for row, prompt in enumerate(pieces.caption_prompts()):
        ids = torch.tensor([prompt])
        inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        inputs["pixel_values"] = pieces.for_torch(pieces.pixels()[row : row + 1])
        with torch.no_grad():
            expected = theirs(**inputs).logits[0, -1]
            said = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        assert relative(logits[row], expected) < TOLERANCE
        assert len(set(said)) > 2  # a caption that varies, so that equality says something
        assert ours.tokens[row][ours.mask[row]].tolist() == said
        assert (ours.tokens[row][len(said) :] == pieces.PAD).all() and ours.finished[row] == (said[-1] == pieces.EOS)


def drawn_by_transformers(theirs, prompts) -> np.ndarray:
    with torch.no_grad():
        tokens = theirs.generate(
            **pieces.left_padded(prompts), generation_mode="image", guidance_scale=GUIDANCE, do_sample=False
        )
    return tokens.numpy()


def test_greedy_drawings_equal_transformers_in_a_padded_batch(saved):
    theirs, config, params = saved
    ids, mask = pieces.right_padded(pieces.drawing_prompts())

    @jax.jit
    def draw(params, ids, mask):
        prefix = drawing.drawing_prefix(config, params, None, ids, mask)
        keys = jax.random.split(jax.random.key(0), len(ids))
        return drawing.draw(config, params, None, prefix, keys, guidance_scale=GUIDANCE, sampling=GREEDY).tokens

    tokens = draw(params, ids, mask)
    expected = drawn_by_transformers(theirs, pieces.drawing_prompts())
    assert len(set(expected.ravel().tolist())) > 8
    np.testing.assert_array_equal(tokens, expected)
    for row, prompt in enumerate(pieces.drawing_prompts()):
        np.testing.assert_array_equal(tokens[row], drawn_by_transformers(theirs, [prompt])[0])


@pytest.mark.trap(46)
def test_guided_logits_of_given_tokens_equal_transformers(saved):
    """Entry t has read the prompt and the tokens before t."""
    theirs, config, params = saved
    tokens = np.random.default_rng(6).integers(0, 64, (3, CELLS)).astype(np.int32)
    ids, mask = pieces.right_padded(pieces.drawing_prompts())

    @jax.jit
    def logits(params, ids, mask, tokens):
        prefix = drawing.drawing_prefix(config, params, None, ids, mask)
        embeds = drawing.for_both_halves(model.embed_image_tokens(config, params, tokens), 1, 2)
        hidden = lm.states_after(config, params, None, prefix, embeds, jnp.ones(embeds.shape[:2], bool))
        states = lm.scoring_states(prefix, hidden)
        return drawing.guided_logits(config, params, states, 1, 2, GUIDANCE)

    ours = logits(params, ids, mask, tokens)
    for row, prompt in enumerate(pieces.drawing_prompts()):
        without = [pieces.BOS, *[pieces.PAD] * (len(prompt) - 2), pieces.BEGIN]
        with torch.no_grad():
            given = theirs.prepare_embeddings_for_image_generation(torch.tensor(tokens[row : row + 1]).repeat(2, 1))
            embeds = torch.cat([theirs.get_input_embeddings()(torch.tensor([prompt, without])), given], dim=1)
            states = theirs.model.language_model(inputs_embeds=embeds).last_hidden_state[:, len(prompt) - 1 : -1]
            scores = theirs.model.generation_head(states)
            expected = scores[1] + GUIDANCE * (scores[0] - scores[1])
        assert relative(ours[row], expected) < TOLERANCE


def test_pixels_of_tokens_equal_transformers(saved):
    theirs, config, params = saved
    tokens = np.random.default_rng(7).integers(0, 64, (3, CELLS)).astype(np.int32)
    ours = jax.jit(functools.partial(vq.decode, config.vq))(params["vq"], tokens)
    with torch.no_grad():
        expected = theirs.decode_image_tokens(torch.tensor(tokens))
    assert ours.shape == (3, 32, 32, 3) and relative(ours, expected) < TOLERANCE


@pytest.mark.trap(48)
def test_tokens_of_pixels_follow_the_official_rule(saved):
    """transformers compares plain vectors; the official code normalises vectors and rows of the codebook first."""
    theirs, config, params = saved
    images = pieces.pixels(6, seed=8)
    ours = jax.jit(functools.partial(vq.encode, config.vq))(params["vq"], images)
    with torch.no_grad():
        vqmodel = theirs.model.vqmodel
        features = vqmodel.quant_conv(vqmodel.encoder(pieces.for_torch(images))).permute(0, 2, 3, 1).reshape(-1, 8)
        features = torch.nn.functional.normalize(features, dim=-1)
        table = torch.nn.functional.normalize(vqmodel.quantize.embedding.weight, dim=-1)
        distances = features.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * features @ table.T
        plain = vqmodel.encode(pieces.for_torch(images)).image_tokens
    np.testing.assert_array_equal(ours.reshape(-1), distances.argmin(1))
    assert (np.asarray(ours).reshape(-1) != plain.numpy()).any()  # the random codebook tells the two rules apart
    assert len(set(distances.argmin(1).tolist())) > 4
