"""Scores under a frozen head, block by block of the vocabulary, against the formula over all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from uae_jax.models.language.frozen_head import frozen_head_scores

ROWS, WIDTH, VOCABULARY = 8, 16, 37  # 37 has no divisor: every number of blocks but one needs padding


def inputs(dtype=jnp.float32):
    """Table, hidden states of length about 4, so that distributions are far from flat, tokens at both ends of the
    vocabulary.
    """
    rng = np.random.default_rng(0)
    table, hidden = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((VOCABULARY, WIDTH), (ROWS, WIDTH)))
    return table, hidden, jnp.asarray([0, 36, 5, 5, 20, 35, 1, 18])


def formula(table, hidden, tokens, temperature):
    """Log-probabilities and entropies of the distribution over the whole vocabulary."""
    log_probs = jax.nn.log_softmax(hidden.astype(jnp.float32) @ table.astype(jnp.float32).T / temperature, axis=-1)
    return jnp.take_along_axis(log_probs, tokens[:, None], 1)[:, 0], -jnp.sum(jnp.exp(log_probs) * log_probs, -1)


def outcome(score, hidden):
    """Scores, and the gradient of a function of the log-probabilities that weighs every row differently."""

    def total(hidden):
        log_probs, entropy = score(hidden)
        return jnp.sum(jnp.arange(1.0, ROWS + 1) * jnp.sin(log_probs)) + jnp.sum(jax.lax.stop_gradient(entropy)), (
            log_probs,
            entropy,
        )

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(hidden)
    return *found, gradient


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", [1, 4, 37])
def test_blocks_of_the_vocabulary_equal_the_whole(tied, blocks):
    table, hidden, tokens = inputs()
    score = functools.partial(
        frozen_head_scores,
        table if tied else table.T,
        tied,
        tokens=tokens,
        temperature=0.7,
        blocks=blocks,
        with_entropy=True,
    )
    wanted = outcome(lambda states: formula(table, states, tokens, 0.7), hidden)
    for found, expected in zip(outcome(score, hidden), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
    alone = frozen_head_scores(
        table if tied else table.T, tied, hidden, tokens, temperature=0.7, blocks=blocks, with_entropy=False
    )
    np.testing.assert_allclose(alone[0], wanted[0], atol=2e-5, rtol=1e-5)
    assert alone[1] is None


def test_logits_of_thousands_do_not_overflow():
    table, hidden, tokens = inputs()
    for found, expected in zip(
        outcome(
            lambda states: frozen_head_scores(
                table, True, states, tokens, temperature=1.0, blocks=5, with_entropy=True
            ),
            1000 * hidden,
        ),
        outcome(lambda states: formula(table, states, tokens, 1.0), 1000 * hidden),
        strict=True,
    ):
        assert jnp.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-2)


@pytest.mark.trap(8)
def test_half_precision_states_have_float32_scores():
    table, hidden, tokens = inputs(jnp.bfloat16)
    log_probs, entropy = frozen_head_scores(table, True, hidden, tokens, temperature=0.7, blocks=4, with_entropy=True)
    wanted, spread = formula(table, hidden, tokens, 0.7)
    assert log_probs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(log_probs, wanted, atol=1e-4)
    np.testing.assert_allclose(entropy, spread, atol=2e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_cut_over_devices_gives_the_same(tied):
    """Eight devices, the vocabulary over four of them: a block has a piece of each."""
    table, hidden, tokens = inputs()

    def score(states):
        return frozen_head_scores(
            table if tied else table.T, tied, states, tokens, temperature=0.7, blocks=3, with_entropy=True
        )

    with jax.set_mesh(jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
        cut = outcome(score, hidden)
    for found, expected in zip(cut, outcome(score, hidden), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-5)
