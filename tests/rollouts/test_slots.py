"""A few slots sample the captions that all rows at once would, in as many turns as a queue needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shared_sampling import CONFIG, GROUP, ROWS, TOKENS, batch_of, mesh, parts_of

from uae_jax import sharding
from uae_jax.models import uae
from uae_jax.models.language.generate import generate
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.language.slots import Turn, generate_in_slots
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.rollouts.captioning import complete_prompts


@pytest.fixture(scope="module")
def prompts():
    """Weights, prompts of different length, keys, and what all rows at once sample."""
    params, adapter = uae.captioner_weights({"vision": {}, "projector": {}} | parts_of(CONFIG), policy=True)
    images = jax.random.normal(jax.random.key(3), (ROWS, 4, CONFIG.text.width))
    prefix = qwen.prompt_prefix(CONFIG, params, adapter, batch_of(), images)
    given = params, adapter, prefix, jax.random.split(jax.random.key(4), ROWS * GROUP)
    return given, sample(generate, given)


def sample(function, given, **more):
    more |= dict(max_new_tokens=TOKENS, stop_ids=tuple(range(60)), group=GROUP)
    return jax.jit(lambda *given: function(CONFIG, *given, **more))(*given)


@pytest.mark.parametrize("slots, packed", [(1, False), (3, False), (3, True), (8, True), (99, False)])
def test_slots_sample_what_all_rows_at_once_sample(prompts, slots, packed):
    given, expected = prompts
    found = sample(generate_in_slots, given, slots=slots, packed=packed)
    for name in ("tokens", "mask", "finished"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    lengths = np.sum(expected.mask, axis=1)
    assert len(set(lengths.tolist())) > 3 and 0 < int(np.sum(expected.finished)) < len(lengths)


@pytest.mark.parametrize("slots", [1, 3, 7])
def test_a_slot_begins_the_next_row_as_soon_as_its_own_has_ended(slots):
    """As a queue that is served by hand."""
    lengths = np.random.default_rng(slots).integers(1, 9, 7)
    turn = Turn(jnp.arange(slots), jnp.zeros(slots, int), jnp.int32(slots))
    queue, current, turns = list(range(slots, 7)), [[row, 0] for row in range(slots)], 0
    while (np.asarray(turn.row) < 7).any():
        busy = [(int(row), int(step)) for row, step in zip(turn.row, turn.step) if row < 7]
        assert busy == [tuple(one) for one in current if one is not None]
        row = np.minimum(np.asarray(turn.row), 6)
        turn = turn.next(jnp.asarray(np.asarray(turn.step) == lengths[row] - 1), 7)
        turns += 1
        for at, one in enumerate(current):
            if one is not None and one[1] == lengths[one[0]] - 1:
                current[at] = [queue.pop(0), 0] if queue else None
            elif one is not None:
                one[1] += 1
    assert not queue and turns >= max(lengths.max(), -(-lengths.sum() // slots))


def test_slots_on_several_devices_are_refused(prompts):
    (params, adapter, prefix, keys), _ = prompts
    more = dict(max_new_tokens=TOKENS, stops=(), sampling=SamplingConfig(), group=GROUP, gather_weights=True)
    with (
        sharding.in_use(mesh()),
        pytest.raises(ValueError, match="rollout_slots is 3; it is for one device.* lies on 8"),
    ):
        complete_prompts(CONFIG, params, adapter, lambda *_: prefix, keys, slots=3, **more)
