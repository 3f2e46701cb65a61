"""What happens between steps, by shapes alone: the written bytes are those of files, the work that of the programs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import presets
from uae_jax.config_file import load_config
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.planning.between import plan_between
from uae_jax.planning.chips import parse_topology
from uae_jax.planning.roofline import MeshSizes
from uae_jax.planning.system import abstract_system
from uae_jax.planning.table import as_json, text_table
from uae_jax.settings import frozen
from uae_jax.stages.export import export_system
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import load_system

MEDIUM = "qwen2_5_vl_3b_sd3_5_medium"
ONE, SLICE = MeshSizes(1, 1, 1), MeshSizes(1, 64, 1)


def planned(preset: str, topology: str, sizes: MeshSizes, stages=("gen_for_und",), **sections):
    config = frozen(RunConfig, presets.merged(presets.preset(preset, stages).to_dict(), sections))
    return plan_between(config, abstract_system(config), parse_topology(topology), sizes)


@pytest.mark.fast
def test_an_export_has_the_bytes_of_its_files(tmp_path):
    config = frozen(RunConfig, presets.preset("tiny", ("pretrain",)).to_dict())
    system = load_system(config.model, image_size=32)
    export_system(system, system.parts, tmp_path / "export")
    stored = (TensorFolder(tmp_path / "export" / name) for name in ("llm", "dit"))
    count = sum(int(np.prod(folder.shape(name))) for folder in stored for name in folder.names())
    writing = plan_between(config, abstract_system(config), parse_topology("cpu:1"), ONE).writing
    assert writing[-1].name == "export" and writing[-1].size == writing[-1].device == 4 * count


def test_a_checkpoint_has_the_state_and_each_device_its_shards():
    config = frozen(RunConfig, presets.preset(MEDIUM, ("gen_for_und",)).to_dict())
    system = abstract_system(config)
    state = make_program(config, system, system.parts, system.batch, "gen_for_und").state
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    alone, cut = (plan_between(config, system, parse_topology(name), sizes).writing for name, sizes in MESHES)
    assert alone[0].size == cut[0].size == size and alone[0].device == size
    assert size / 64 <= cut[0].device < size / 8
    # what a finished stage leaves: neither moments nor averages
    assert alone[1].size * 3 == pytest.approx(size, rel=1e-3)


MESHES = ("gpu:1xH200", ONE), ("v5e:8x8", SLICE)


def test_a_second_scale_repeats_drawings_alone_and_without_guidance_for_half():
    once, doubled, guided, plain = (
        planned(MEDIUM, "v5e:8x8", SLICE, evaluation=dict(images=images, also_guidance_scale=scale)).scoring[0].flops
        for images, scale in ((64, 0.0), (128, 0.0), (64, 4.0), (64, 1.0))
    )
    assert doubled == 2 * once
    # captions are written once
    assert 1.5 * once < guided < 2 * once
    # the transformer is most of a drawing, and runs half as often
    assert plain - once == pytest.approx((guided - once) / 2, rel=0.05)


def test_batches_are_whole_on_a_mesh():
    complete, during = planned(MEDIUM, "v5e:8x8", SLICE).scoring
    assert (complete.batch, complete.images, during.images) == (64, 100, 32)
    assert complete.seconds > during.seconds > 0
    # without parts of a batch on each chip, the same images take as many calls as images
    alone = planned(MEDIUM, "gpu:1xH200", ONE).scoring[0]
    assert alone.batch == 4 and alone.seconds > complete.seconds


def test_one_network_and_caption_states_are_counted_too():
    states = presets.merged(
        presets.preset("tiny", ("cold_start",)).to_dict(), dict(cold_start=dict(condition="caption_states"))
    )
    for given in (states, load_config("unified_ar:janus_pro_1b").to_dict()):
        config = frozen(RunConfig, given)
        (stage,) = config.stages
        found = plan_between(config, abstract_system(config), parse_topology("cpu:1"), ONE)
        assert all(row.flops > 0 for row in found.scoring)
        assert [row.name for row in found.writing] == [f"checkpoint of {stage}", f"what {stage} trained", "export"]


def test_the_table_and_the_json_have_them():
    found, topology = planned(MEDIUM, "v5e:8x8", SLICE), parse_topology("v5e:8x8")
    text = text_table([], topology, SLICE, MEDIUM, None, found)
    assert f"| complete | before and after each stage | 100 | 64 | {found.scoring[0].flops:.2e} |" in text
    assert f"| export | at the end of the run, by the first process | {found.writing[-1].size / 1e9:.2f} |" in text
    stored = json.loads(as_json([], topology, SLICE, MEDIUM, None, found))["between"]
    assert stored["writing"][0] == dataclasses.asdict(found.writing[0])
