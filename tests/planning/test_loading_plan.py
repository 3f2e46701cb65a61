"""The bytes of reading a model, by formula: those of the devices are exact, and the host's bound what is read."""

import json

import jax
import numpy as np
import pytest

from configs import presets
from uae_jax import sharding, trees
from uae_jax.hf import rules
from uae_jax.planning.chips import GIB, parse_topology
from uae_jax.planning.estimate import share
from uae_jax.planning.loading import held_parts, plan_loading
from uae_jax.planning.plan import mesh_sizes
from uae_jax.planning.roofline import MeshSizes
from uae_jax.planning.system import abstract_system
from uae_jax.planning.table import as_json, text_table
from uae_jax.settings import frozen
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import load_system

RL = ("gen_for_und", "und_for_gen")
MEDIUM, LARGE = "qwen2_5_vl_3b_sd3_5_medium", "qwen2_5_vl_3b_sd3_5_large"


def loading_of(config: dict, topology, sizes: MeshSizes):
    found = frozen(RunConfig, config)
    return plan_loading(found, abstract_system(found), topology, sizes)


def settings(preset: str, stages=RL, **sections) -> dict:
    return presets.merged(presets.preset(preset, stages).to_dict(), sections)


@pytest.mark.parametrize("preset, before, after", [(MEDIUM, 28.2, 15.6), (LARGE, 51.0, 27.1)])
def test_published_sizes_are_read_in_nearly_half_the_bytes_where_adapters_train(preset, before, after):
    topology, sizes = parse_topology("gpu:1xH200"), MeshSizes(1, 1, 1)
    found = [
        loading_of(settings(preset, model=dict(frozen_dtype=dtype)), topology, sizes)
        for dtype in ("float32", "bfloat16")
    ]
    assert [loading.device / 1e9 for loading in found] == pytest.approx([before, after], rel=0.01)
    # of the host: one parameter of all layers, never a part
    assert all(loading.host < 0.15 * loading.device for loading in found)


def test_a_part_that_a_stage_trains_is_read_in_float32():
    config = frozen(RunConfig, settings(MEDIUM, ("pretrain", *RL)))
    parts = held_parts(config, abstract_system(config))
    kinds = {name: {leaf.dtype.name for leaf in jax.tree.leaves(parts[name])} for name in ("language", "transformer")}
    assert kinds == {"language": {"bfloat16"}, "transformer": {"float32"}}


@pytest.mark.parametrize("mesh", [dict(data=8, fsdp=1, tensor=1), dict(data=1, fsdp=8, tensor=1)])
def test_the_figures_are_those_of_reading(mesh, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    config = frozen(RunConfig, settings("tiny", mesh=mesh, model=dict(frozen_dtype="bfloat16")))
    topology, system, blocks, block = parse_topology("cpu:8"), abstract_system(config), [], rules._Stored._block

    def counted(self, index, dtype):
        blocks.append(block(self, index, dtype))
        return blocks[-1]

    monkeypatch.setattr(rules._Stored, "_block", counted)
    placed = load_system(
        config.model,
        image_size=32,
        mesh=sharding.make_mesh(config.mesh, jax.devices()[:8]),
        frozen=config.frozen_from_start(),
    ).parts
    found = plan_loading(config, system, topology, mesh_sizes(config, 8))
    # new adapters are made on the devices
    adapters = {name: part for name, part in held_parts(config, system).items() if name.endswith("_lora")}
    leaves = [leaf for name, leaf in trees.flatten(placed).items() if "_lora/" not in name]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert found.device == held + share(adapters, mesh_sizes(config, 8))
    assert found.host >= 8 * held + max(made.nbytes for made in blocks if made.dtype != np.float32)


def test_table_and_json_have_it():
    topology, sizes = parse_topology("v6e:2x2"), MeshSizes(1, 4, 1)
    loading = loading_of(settings(MEDIUM, mesh=dict(data=1, fsdp=4)), topology, sizes)
    text = text_table([], topology, sizes, "medium", loading)
    assert f"Reading the weights: {loading.device / GIB:.2f} GiB on each device" in text and loading.largest in text
    assert json.loads(as_json([], topology, sizes, "medium", loading))["loading"]["host"] == loading.host
    assert loading.device < 5e9
