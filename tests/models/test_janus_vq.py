"""Janus's image tokenizer: what a code is, where its pixels are, and which code a picture gets."""

import functools

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from janus_pieces import CONFIG

from uae_jax import trees
from uae_jax.models.janus import vq

CELLS = CONFIG.vq.tokens
decode = jax.jit(functools.partial(vq.decode, CONFIG.vq))
encode = jax.jit(functools.partial(vq.encode, CONFIG.vq))


@pytest.fixture(scope="module")
def params():
    return pieces.small_params()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (CELLS, CELLS)).astype(np.int32)


@pytest.mark.trap(48)
def test_the_length_of_a_code_leaves_pixels_and_its_direction_does_not(params, tokens):
    lengths = jnp.linspace(0.2, 9.0, 64)[:, None]
    pixels = decode(params["vq"], tokens)
    longer = pieces.replaced(params, "vq/codebook/table", lambda leaf: leaf * lengths)
    np.testing.assert_allclose(decode(longer["vq"], tokens), pixels, atol=1e-4)
    turned = pieces.replaced(params, "vq/codebook/table", lambda leaf: leaf[:, ::-1])
    assert float(jnp.abs(decode(turned["vq"], tokens) - pixels).max()) > 1e-2


@pytest.mark.trap(49)
def test_a_token_moves_its_own_cell_in_reading_order(params):
    tokens = jnp.zeros((CELLS, CELLS), jnp.int32)
    moved = tokens + jnp.eye(CELLS, dtype=jnp.int32)  # row t changes token t
    grids = [np.asarray(vq.code_grid(CONFIG.vq, params["vq"], x)) for x in (tokens, moved)]
    changed = np.abs(grids[1] - grids[0]).sum(-1) > 0
    assert [np.argwhere(cells).tolist() for cells in changed] == [[[t // 4, t % 4]] for t in range(CELLS)]


@pytest.mark.trap(49)
def test_the_pixels_of_a_token_are_in_its_cell(params):
    """In a decoder whose convolutions look at one pixel, and whose attention is off."""

    def local(name, leaf):
        if "attention" in name and "/output/" in name:
            return 0 * leaf
        return leaf * jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1) if leaf.shape[:2] == (3, 3) else leaf

    tree = trees.map_with_name(local, params["vq"])
    tokens = jnp.zeros((CELLS, CELLS), jnp.int32)
    difference = np.abs(decode(tree, tokens + 3 * jnp.eye(CELLS, dtype=jnp.int32)) - decode(tree, tokens)).sum(-1)
    cells = difference.reshape(CELLS, 4, 8, 4, 8).sum((2, 4)).reshape(CELLS, CELLS)
    assert cells.argmax(1).tolist() == list(range(CELLS))
    assert (cells.max(1) > 5 * np.median(cells, 1)).all()  # the rest is the norms' share


def test_tokens_of_pixels_are_those_of_the_nearest_direction(params):
    tokens = encode(params["vq"], pieces.pixels(2))
    longer = pieces.replaced(params, "vq/codebook/table", lambda leaf: leaf * jnp.linspace(0.2, 9.0, 64)[:, None])
    np.testing.assert_array_equal(encode(longer["vq"], pieces.pixels(2)), tokens)
    with pytest.raises(ValueError, match="takes images of 32 pixels"):
        vq.encode(CONFIG.vq, params["vq"], jnp.zeros((1, 16, 16, 3)))
