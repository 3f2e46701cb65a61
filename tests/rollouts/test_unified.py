"""Captions and drawings by sample number: the same in any batch, group and on any mesh."""

import functools

import janus_pieces as pieces
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from janus_pieces import CONFIG

from uae_jax import sharding
from uae_jax.models.janus import config as configs
from uae_jax.models.janus import drawing, model
from uae_jax.models.language import model as lm
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.nn.lora import init_lora
from uae_jax.rollouts import unified
from uae_jax.sharding import LARGE, MeshConfig, make_mesh, parameter_spec
from uae_jax.trees import flatten

HOW = unified.DrawingConfig(guidance_scale=3.0)
KEY, GROUP = jax.random.key(3), 2


@pytest.fixture(scope="module")
def parts():
    found = pieces.small_params()
    zero = init_lora(jax.random.key(1), found["language"], lm.ADAPTER_PATTERN, 2)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), zero)
    return found | {"language_lora": adapter}


@functools.partial(jax.jit, static_argnames="gather")
def drawn(parts, ids, mask, sample_id, gather=False):
    found = unified.sample_drawings(CONFIG, parts, HOW, ids, mask, sample_id, KEY, group=GROUP, gather_weights=gather)
    return found, unified.pixels(CONFIG, parts, HOW, found.tokens)


@jax.jit
def said(parts, batch):
    return unified.sample_captions(
        CONFIG, parts, batch, KEY, max_new_tokens=6, sampling=SamplingConfig(0.9), group=GROUP
    )


def prompts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four texts, so that a mesh may divide them."""
    listed = pieces.drawing_prompts()
    return *pieces.right_padded([*listed, listed[0]]), np.arange(10, 14, dtype=np.int32)


def test_drawings_follow_their_numbers_and_not_their_place(parts):
    ids, mask, numbers = prompts()
    first, images = drawn(parts, ids, mask, numbers)
    order = np.array([2, 0, 3, 1])
    again, _ = drawn(parts, ids[order], mask[order], numbers[order])
    rows = (order[:, None] * GROUP + np.arange(GROUP)).ravel()
    np.testing.assert_array_equal(again.tokens, np.asarray(first.tokens)[rows])
    assert images.shape == (4 * GROUP, 32, 32, 3) and float(jnp.abs(images).max()) <= 1
    tokens = np.asarray(first.tokens).reshape(4, GROUP, -1)
    assert (tokens[:, 0] != tokens[:, 1]).any(1).all()  # members of a group differ
    assert (tokens[0] != tokens[3]).any()  # and so do equal texts with other numbers


@pytest.mark.trap(53)
def test_a_drawing_reads_nothing_that_sees_pictures(parts):
    """Its prompt is text alone; the picture of a caption reaches it through the caption's words."""
    expected, _ = drawn(parts, *prompts())
    changed = parts
    for name in ("vision/patch_embedding/kernel", "aligner/first/kernel", "vq/encoder/conv_in/kernel"):
        changed = pieces.replaced(changed, name, lambda leaf: 0 * leaf + 7)
    np.testing.assert_array_equal(drawn(changed, *prompts())[0].tokens, expected.tokens)


def test_captions_follow_their_numbers_and_their_pictures(parts):
    listed = pieces.caption_prompts()
    ids, mask = pieces.right_padded([*listed, listed[0]])
    batch = {"prompt_ids": ids, "prompt_mask": mask, "pixels": pieces.pixels(4), "sample_id": np.arange(4)}
    first = said(parts, batch)
    order = np.array([2, 0, 3, 1])
    again = said(parts, {name: value[order] for name, value in batch.items()})
    rows = (order[:, None] * GROUP + np.arange(GROUP)).ravel()
    np.testing.assert_array_equal(again.tokens, np.asarray(first.tokens)[rows])
    other = said(parts, batch | {"pixels": pieces.pixels(4, seed=9)})
    assert (np.asarray(other.tokens) != np.asarray(first.tokens)).any()


def test_a_mesh_draws_as_one_device_does(parts, monkeypatch):
    ids, mask, numbers = prompts()
    one, images = drawn(parts, ids, mask, numbers)
    monkeypatch.setattr(sharding, "SMALL", 256)  # so that parameters are sharded
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    placed = sharding.shard_tree(parts, mesh)
    assert not placed["language"]["layers"]["mlp"]["up"]["kernel"].is_fully_replicated
    with jax.set_mesh(mesh):
        batch = sharding.shard_batch(dict(ids=ids, mask=mask, numbers=numbers), mesh)
        found, seen = drawn(placed, batch["ids"], batch["mask"], batch["numbers"], gather=True)
    np.testing.assert_array_equal(found.tokens, one.tokens)
    # guidance multiplies the rounding of sums that devices take in another order
    np.testing.assert_allclose(found.log_probs, one.log_probs, atol=1e-3)
    np.testing.assert_allclose(seen, images, atol=1e-3)


def test_full_sizes_leave_nothing_large_on_every_device():
    mesh = make_mesh(MeshConfig(1, 4, 2), jax.devices()[:8])
    for config in configs.SIZES.values():
        for name, leaf in flatten(model.abstract_params(config)).items():
            spec = parameter_spec(name, leaf.shape, mesh)
            assert leaf.size <= LARGE or any(spec), name


def test_the_reference_has_no_adapter(parts):
    with_adapter, without = (unified.weights(parts, policy=policy) for policy in (True, False))
    assert with_adapter[1] is parts["language_lora"] and without[1] is None
    assert with_adapter[0].keys() == without[0].keys() == {"vision", "aligner", "language", "generation", "vq"}
    prefix = functools.partial(drawing.drawing_prefix, CONFIG)
    ids, mask, _ = prompts()
    states = [jax.jit(prefix)(*weights, ids, mask).last_hidden for weights in (with_adapter, without)]
    assert float(jnp.abs(states[0] - states[1]).max()) > 1e-2
