"""What is reported of sampled captions, against counts made by hand."""

import jax.numpy as jnp
import pytest

from uae_jax.models.qwen2_5_vl.generate import Completion
from uae_jax.rl.captioning import caption_metrics

STOP, PAD = 1, 0
ROWS = [  # two groups of three: tokens, how many of them count
    ([5, 6, STOP, PAD], 3), ([5, 6, STOP, PAD], 3), ([7, 7, 7, 7], 4),  # the last was cut off
    ([8, STOP, PAD, PAD], 2), ([8, 9, STOP, PAD], 3), ([STOP, PAD, PAD, PAD], 1)]


def test_captions_are_counted_as_by_hand():
    tokens, lengths = jnp.asarray([row for row, _ in ROWS]), jnp.asarray([length for _, length in ROWS])
    mask = jnp.arange(4) < lengths[:, None]
    completion = Completion(tokens, mask, jnp.zeros(tokens.shape), jnp.asarray([True, True, False, True, True, True]))
    found = {name: float(total) / float(count) for name, (total, count) in caption_metrics(completion, 3).items()}
    assert found == pytest.approx({
        "caption_tokens": (2 + 2 + 4 + 1 + 2 + 0) / 6,  # without the stop token
        "truncated_fraction": 1 / 6,
        "unique_fraction": (2 + 3) / 6,  # two different captions in the first group, three in the second
        "repeated_fraction": 2 / 16})  # the third and the fourth 7 of 16 tokens
