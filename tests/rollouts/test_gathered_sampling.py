"""Caption sampling over sharded weights, as it is compiled: what the loop over tokens receives from other devices."""

import importlib.util
import math
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uae_jax import plan, sharding, trees
from uae_jax.models.language.model import ADAPTER_PATTERN
from uae_jax.models.language.sampling import SamplingConfig
from uae_jax.models.qwen2_5_vl import model as qwen
from uae_jax.models.qwen2_5_vl.config import Qwen2_5VLConfig, TextConfig, VisionConfig
from uae_jax.nn.lora import init_lora
from uae_jax.planning.chips import parse_topology
from uae_jax.planning.collectives import collectives_of
from uae_jax.planning.compile import QUICK, plan_mesh
from uae_jax.planning.hlo import Module
from uae_jax.rollouts.captioning import sample_captions

TOKENS, LAYERS, ROWS, PROMPT = 24, 3, 8, 16
CONFIG = Qwen2_5VLConfig(
    vision=VisionConfig(depth=1, width=16, heads=2, mlp_width=24, out_width=128),
    text=TextConfig(
        vocab_size=512,
        width=128,
        layers=LAYERS,
        heads=4,
        key_heads=2,
        mlp_width=256,
        mrope_section=(4, 6, 6),
        dtype="bfloat16",
    ),
)


def sample(parts, batch, keys, images, gather):
    return sample_captions(
        types.SimpleNamespace(captioner=CONFIG, banned=()),
        parts,
        batch,
        keys,
        images,
        max_new_tokens=TOKENS,
        stops=(1,),
        sampling=SamplingConfig(1.0),
        group=2,
        gather_weights=gather,
    ).tokens


def received_for_tokens(mesh, gather: bool, options=None) -> list[tuple[int, ...]]:
    """Shapes of what collectives make inside of the loop over tokens, of weights and adapters that are all cut."""
    language = qwen.abstract_params(CONFIG)["language"]
    adapter = jax.eval_shape(lambda: init_lora(jax.random.key(0), language, ADAPTER_PATTERN, 8))
    parts = {"language": language, "language_lora": adapter}
    placed = sharding.tree_shardings(parts, mesh)
    cut = [name for name, leaf in trees.flatten(placed).items() if "fsdp" in leaf.spec]
    assert len(cut) == 1 + 7 + 14  # the table, seven matrices of the stacked layers, and two factors for each of these
    parts = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), parts, placed)
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(sharding.BATCH), PartitionSpec()))

    def batch_of(dtype, *shape):
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=rows)

    batch = {
        "prompt_ids": batch_of(jnp.int32, PROMPT),
        "prompt_mask": batch_of(jnp.bool_, PROMPT),
        "prompt_positions": batch_of(jnp.int32, PROMPT, 3),
        "prompt_next": batch_of(jnp.int32),
        "sample_id": batch_of(jnp.int32),
    }
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    images = batch_of(jnp.bfloat16, 4, CONFIG.text.width)
    with sharding.in_use(mesh):
        lowered = jax.jit(lambda parts, *rest: sample({"vision": {}, "projector": {}} | parts, *rest, gather)).lower(
            parts, batch, key, images
        )
        module = Module(lowered.compile(compiler_options=options).as_text(), TOKENS)
    found = [
        array.shape
        for use in module.uses()
        if use.times >= TOKENS
        for collective in collectives_of(module, use)
        for array in collective.made
    ]
    assert found, "the end of the loop depends on all devices"
    return found


@pytest.fixture
def everything_is_cut(monkeypatch):
    """Even the factors of a small model's adapters are sharded."""
    monkeypatch.setattr(sharding, "SMALL", 256)


def test_a_rollout_gathers_weights_and_adapters_once_and_no_token_gathers_any(everything_is_cut):
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 8, 1), jax.devices()[:8])
    assert {math.prod(shape) for shape in received_for_tokens(mesh, gather=True)} == {1}
    # without, every token gathers every layer
    assert max(math.prod(shape) for shape in received_for_tokens(mesh, gather=False)) >= 128 * 256


@pytest.mark.slow
def test_libtpu_gathers_weights_and_adapters_once_too(everything_is_cut):
    topology = parse_topology("v5e:2x4")
    config = types.SimpleNamespace(mesh=sharding.MeshConfig(1, 8, 1))
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(ImportError, match="extra `tpu`"):
            plan_mesh(config, topology)
        return
    plan.prepare_environment(topology.name)
    mesh, options = plan_mesh(config, topology), {"exec_time_optimization_effort": QUICK}
    assert {math.prod(shape) for shape in received_for_tokens(mesh, True, options)} == {1}
    assert max(math.prod(shape) for shape in received_for_tokens(mesh, False, options)) >= 128 * 256
