"""The vocabulary's logits never exist for a whole caption, in the compiled step of gen_for_und and in its pieces."""

import math

import jax
import numpy as np
import pytest
from programs import equations
from stage_pieces import stage_of, varied

from uae_jax.methods.gen_for_und import PROMPT_FIELDS
from uae_jax.methods.method import build_step
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.step import init_state

TOKENS = 37  # no other size of the small model


@pytest.fixture(scope="module")
def stage(whole):
    return stage_of(whole, "gen_for_und", max_new_tokens=TOKENS, updates_per_rollout=2)


def sizes_with(function, arguments, length: int) -> set[int]:
    """Numbers in the arrays that a traced function makes and that have an axis of this length."""
    shapes = {
        variable.aval.shape
        for equation in equations(function, *arguments)
        for variable in equation.outvars
        if length in getattr(variable.aval, "shape", ())
    }
    return {math.prod(shape) for shape in shapes}


@pytest.mark.parametrize("chunk", [2, TOKENS])
def test_no_array_of_the_step_has_more_logits_than_those_of_a_chunk(stage, chunk):
    """All positions see a block of the vocabulary, as large as a chunk of positions with the whole vocabulary."""
    method = varied(stage.method, score_chunk=chunk)
    optimizer = make_optimizer(stage.config.optimizer, 10)
    arguments = init_state(stage.trained, optimizer), stage.frozen, stage.batch, stage.key
    vocabulary, rows = method.system.model.captioner.text.vocab_size, stage.config.batch_size * stage.config.group_size
    step, block = build_step(method, optimizer), -(-vocabulary // -(-TOKENS // chunk))
    assert rows * TOKENS * block in sizes_with(step, arguments, block)
    assert max(sizes_with(step, arguments, vocabulary)) <= rows * chunk * vocabulary


def test_the_scoring_chunk_changes_neither_scores_nor_gradient(stage):
    tokens = jax.random.randint(jax.random.key(3), (stage.config.batch_size, stage.config.group_size, TOKENS), 0, 20)
    samples = {name: stage.batch[name] for name in PROMPT_FIELDS} | {
        "tokens": tokens,
        "mask": np.ones(tokens.shape, bool),
        "image_embeds": None,
    }

    def score(chunk):
        method = varied(stage.method, score_chunk=chunk)

        def total(params):
            scores = method.score_captions({**stage.frozen, **params}, samples, trained=True)
            return scores.log_probs.sum(), scores

        return jax.jit(jax.grad(total, has_aux=True))(stage.trained)

    whole, pieces = score(TOKENS), score(5)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces)):
        np.testing.assert_allclose(other, one, atol=1e-4 * max(float(np.abs(one).max()), 1e-3))
