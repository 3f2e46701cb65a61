"""What is reported of sampled captions, against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.models.language.generate import Completion
from uae_jax.rollouts.captioning import caption_metrics, repeated_sequences

STOP, PAD = 1, 0
ROWS = [  # two groups of three: tokens, how many of them count
    ([5, 6, STOP, PAD], 3),
    ([5, 6, STOP, PAD], 3),
    ([7, 7, 7, 7], 4),  # the last was cut off
    ([8, STOP, PAD, PAD], 2),
    ([8, 9, STOP, PAD], 3),
    ([STOP, PAD, PAD, PAD], 1),
]


@pytest.mark.trap(6)
def test_captions_are_counted_as_by_hand():
    tokens, lengths = jnp.asarray([row for row, _ in ROWS]), jnp.asarray([length for _, length in ROWS])
    mask = jnp.arange(4) < lengths[:, None]
    completion = Completion(tokens, mask, jnp.zeros(tokens.shape), jnp.asarray([True, True, False, True, True, True]))
    found = {name: float(total) / float(count) for name, (total, count) in caption_metrics(completion, 3).items()}
    assert found == pytest.approx(
        {
            "caption_tokens": (2 + 2 + 4 + 1 + 2 + 0) / 6,  # without the stop token
            "truncated_fraction": 1 / 6,
            "unique_fraction": (2 + 3) / 6,  # two different captions in the first group, three in the second
            "repetition": 0.0,
        }
    )  # one caption has one sequence of four tokens


@pytest.mark.trap(6)
@pytest.mark.parametrize("seed", range(3))
def test_repeated_sequences_are_those_that_a_loop_finds(seed):
    rng = np.random.default_rng(seed)
    tokens, lengths = rng.integers(0, 3, (16, 40)), rng.integers(0, 41, 16)
    repeats, sequences = jax.jit(repeated_sequences)(jnp.asarray(tokens), jnp.arange(40) < lengths[:, None])
    for row, length, found, total in zip(tokens, lengths, repeats, sequences, strict=True):
        grams = [tuple(row[start : start + 4]) for start in range(length - 3)]
        assert (int(found), int(total)) == (len(grams) - len(set(grams)), len(grams))
    assert repeats.sum() > 16
    for width in (2, 4):  # shorter than two sequences
        found, total = repeated_sequences(jnp.zeros((1, width), jnp.int32), jnp.ones((1, width), bool))
        assert (float(found[0]), float(total[0])) == (0, width // 4)
