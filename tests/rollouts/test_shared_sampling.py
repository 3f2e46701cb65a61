"""Devices that share the captioner's weights sample what each would sample with a copy of its own."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import sharding, trees
from uae_jax.models.language import shared_decoding
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.nn.lora import init_lora
from uae_jax.planning.collectives import collectives_of
from uae_jax.planning.hlo import Module
from uae_jax.rollouts.captioning import sample_captions

TOKENS, ROWS, PROMPT, GROUP = 12, 8, 16, 2
TEXT = TextConfig(vocab_size=512, width=64, layers=2, heads=8, key_heads=2, mlp_width=128, mrope_section=(1, 1, 2))
CONFIG = Qwen2_5VLConfig(vision=VisionConfig(depth=1, width=16, heads=2, mlp_width=24, out_width=64), text=TEXT)


@pytest.fixture(autouse=True)
def everything_is_cut(monkeypatch):
    """Even the matrices of a small model are sharded."""
    monkeypatch.setattr(sharding, "SMALL", 256)


def mesh():
    return sharding.make_mesh(sharding.MeshConfig(1, 8, 1), jax.devices()[:8])


def parts_of(config):
    """Random weights, large enough that captions differ, and an adapter that is not zero."""

    def random(name, leaf):
        return 0.3 * jax.random.normal(trees.name_key(jax.random.key(1), name), leaf.shape)

    language = trees.map_with_name(random, qwen.abstract_params(config)["language"])
    adapter = init_lora(jax.random.key(0), language, ADAPTER_PATTERN, 8)
    return {"language": language, "language_lora": trees.map_with_name(random, adapter)}


def batch_of():
    ids = jax.random.randint(jax.random.key(2), (ROWS, PROMPT), 2, 500)
    lengths = 9 + jnp.arange(ROWS) % 8
    place = jnp.broadcast_to(jnp.arange(PROMPT)[None, :, None], (ROWS, PROMPT, 3))
    return {
        "prompt_ids": ids,
        "prompt_mask": jnp.arange(PROMPT) < lengths[:, None],
        "prompt_positions": place,
        "prompt_next": lengths,
        "sample_id": jnp.arange(ROWS),
    }


def sampler(config, ways, weights="model"):
    def sample(parts, batch, key, images):
        return sample_captions(
            types.SimpleNamespace(captioner=config, banned=()),
            {"vision": {}, "projector": {}} | parts,
            batch,
            key,
            images,
            max_new_tokens=TOKENS,
            stops=tuple(range(40)),
            sampling=SamplingConfig(1.0),
            group=GROUP,
            gather_weights=True,
            weights=weights,
            ways=ways,
        )

    return sample


def placed(config):
    parts, rows = sharding.shard_tree(parts_of(config), mesh()), NamedSharding(mesh(), PartitionSpec(sharding.BATCH))
    images = jax.random.normal(jax.random.key(3), (ROWS, 4, TEXT.width))
    key = jax.device_put(jax.random.key(4), NamedSharding(mesh(), PartitionSpec()))
    return parts, jax.device_put(batch_of(), rows), key, jax.device_put(images, rows)


@pytest.mark.parametrize(
    "ways, change, weights",
    [
        (1, {}, "model"),
        (2, {}, "int8"),
        (4, {}, "model"),  # two devices of a group hold the same key head
        (4, dict(tied=False, qkv_bias=False, key_heads=4), "model"),
    ],
)
def test_shared_weights_sample_the_captions_of_a_copy(ways, change, weights):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **change))
    given = placed(config)
    with sharding.in_use(mesh()):
        expected = jax.jit(sampler(config, 0, weights))(*given)
        found = jax.jit(sampler(config, ways, weights))(*given)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=2e-4)
    assert len({tuple(row) for row in np.asarray(found.tokens).tolist()}) > ROWS
    assert 0 < int(found.finished.sum()) < ROWS * GROUP


def test_a_token_exchanges_rows_and_no_weights():
    given = placed(CONFIG)
    with sharding.in_use(mesh()):
        text = jax.jit(sampler(CONFIG, 4)).lower(*given).compile().as_text()
    module = Module(text, TOKENS)
    found = [
        sum(math.prod(array.shape) for array in collective.made)
        for use in module.uses()
        if use.times >= TOKENS
        for collective in collectives_of(module, use)
    ]
    rows = 4 * ROWS * GROUP // 8
    # logits of the device's own rows, sums of states and of embeddings, tokens, and the end of the loop
    assert set(found) == {rows // 4 * TEXT.vocab_size, rows * TEXT.width, rows, 1}


def test_devices_that_do_not_divide_the_model_are_refused():
    assert shared_decoding.problem(TEXT, 4) == ""
    assert shared_decoding.problem(TEXT, 3) == "8 query heads and 2 key heads"
    assert "a vocabulary of 510" in shared_decoding.problem(dataclasses.replace(TEXT, vocab_size=510), 4)
    with sharding.in_use(mesh()), pytest.raises(ValueError, match="rollout_ways is 3; it must divide mesh.fsdp"):
        jax.eval_shape(sampler(CONFIG, 3), *placed(CONFIG))
    narrow = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, mlp_width=100, vocab_size=510))
    with sharding.in_use(mesh()), pytest.raises(ValueError, match="8, which does not divide an MLP of 100"):
        jax.eval_shape(sampler(narrow, 8), *placed(narrow))


def test_without_a_mesh_every_device_has_its_copy():
    parts, batch, key, images = parts_of(CONFIG), batch_of(), jax.random.key(4), jnp.ones((ROWS, 4, TEXT.width))
    one, other = (jax.jit(sampler(CONFIG, ways))(parts, batch, key, images).tokens for ways in (0, 4))
    np.testing.assert_array_equal(one, other)
