"""A model folder goes straight to its mesh; cut over several devices it says and draws the same."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, make_run, nudged

from uae_jax import sharding, trees
from uae_jax.data import scenes
from uae_jax.methods.trained import STORABLE as EVERY
from uae_jax.methods.trained import store, stored
from uae_jax.sharding import MeshConfig, make_mesh
from uae_jax.stages.export import export_system
from uae_jax.stages.inference import Inference, InferenceConfig, Row
from uae_jax.stages.weights import ModelConfig, load_system

# of a captioner with SD3
STORABLE = tuple(name for name in EVERY if name not in ("text_encoder", "aligner", "generation"))


def test_every_part_lies_on_the_mesh_by_the_rules_of_the_whole_model(model_folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 256)  # even a tiny model is cut
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    host = load_system(ModelConfig(folder=str(model_folder)), image_size=16)
    placed = load_system(ModelConfig(folder=str(model_folder)), image_size=16, mesh=mesh)
    assert placed.model == host.model and placed.encoders == host.encoders
    shardings = trees.flatten(sharding.tree_shardings(host.parts, mesh))
    leaves = trees.flatten(placed.parts)
    assert set(leaves) == set(shardings) and any(not leaf.sharding.is_fully_replicated for leaf in leaves.values())
    for name, leaf in trees.flatten(host.parts).items():
        assert isinstance(leaf, np.ndarray) and leaves[name].sharding == shardings[name], name
        np.testing.assert_array_equal(leaves[name], leaf)


def test_a_run_holds_its_parameters_once(config, tmp_path):
    run = make_run(config, tmp_path, devices=2)
    assert run.system.parts == {} and all(len(leaf.devices()) == 2 for leaf in jax.tree.leaves(run.parts))


# what each run trains, and the parts that may then be rounded while they are read
HALVED = {
    "adapters": (dict(stages=("gen_for_und", "und_for_gen")), {"vision", "language", "projector", "transformer"}),
    "supervised": (dict(stages=("pretrain", "gen_for_und")), {"vision", "language"}),
    "projector frozen": (
        dict(stages=("pretrain",), pretrain=dict(train_projector=False)),
        {"vision", "language", "projector"},
    ),
    "captioner whole": (
        dict(stages=("gen_for_und",), gen_for_und=dict(train="full")),
        {"vision", "projector", "transformer"},
    ),
    "decoder whole": (
        dict(stages=("gen_for_und", "und_for_gen"), und_for_gen=dict(train="full")),
        {"vision", "language", "projector"},
    ),
    "scores alone": (dict(stages=()), set()),
}


@pytest.mark.parametrize("case", HALVED)
def test_a_run_reads_what_nothing_trains_in_the_precision_in_which_it_is_held(config, tmp_path, case):
    changes, halved = HALVED[case]
    values = changed(config, model=dict(frozen_dtype="bfloat16"), **changes)
    run = make_run(values, tmp_path)
    kinds = {name: {leaf.dtype.name for leaf in jax.tree.leaves(run.parts[name])} for name in STORABLE}
    assert kinds == {name: {"bfloat16" if name in halved else "float32"} for name in STORABLE}
    # the same numbers as those of a stage that rounds what was read in float32
    exact = load_system(ModelConfig(folder=values["model"]["folder"]), image_size=16).parts
    for name in halved:
        rounded = stored({name: jax.tree.map(jnp.asarray, exact[name])}, (), "bfloat16")[name]
        jax.tree.map(np.testing.assert_array_equal, run.parts[name], rounded)


@pytest.mark.parametrize("devices", [0, 1])
def test_adapters_are_merged_in_float32_and_the_sum_is_rounded_once(whole, tmp_path, devices):
    adapters = {name: nudged(whole.parts[name]) for name in ("language_lora", "transformer_lora")}
    export_system(whole.system, dict(whole.parts) | adapters, tmp_path)
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices]) if devices else None
    settings = dict(folder=str(tmp_path), merge_adapters=True, frozen_dtype="bfloat16")
    exact = load_system(ModelConfig(**settings), image_size=16, mesh=mesh).parts
    found = load_system(ModelConfig(**settings), image_size=16, mesh=mesh, frozen=set(STORABLE) - {"projector"}).parts
    for name in STORABLE:
        dtype = "float32" if name == "projector" else "bfloat16"
        for leaf, value in trees.flatten(found[name]).items():
            assert value.dtype == dtype, leaf
            np.testing.assert_array_equal(value, np.asarray(trees.flatten(exact[name])[leaf]).astype(dtype))


def test_a_part_that_a_stage_freezes_is_never_twice_in_memory(monkeypatch):
    leaves = {f"layer{number}": jnp.full(1000, number, jnp.float32) for number in range(8)}
    alive = [weakref.ref(leaf) for leaf in leaves.values()]
    parts, most = {"language": leaves, "vae": {"kernel": jnp.zeros(3)}, "vision": {"kernel": jnp.zeros(2)}}, 0
    del leaves
    astype = type(parts["vae"]["kernel"]).astype

    def counted(leaf, dtype):
        nonlocal most
        rounded = astype(leaf, dtype)
        halved.append(weakref.ref(rounded))
        most = max(most, sum(ref() is not None for ref in (*alive, *halved)))
        return rounded

    halved: list = []
    monkeypatch.setattr(type(parts["vae"]["kernel"]), "astype", counted)
    store(parts, {"vision"}, "bfloat16")
    assert most == len(alive) + 1
    kinds = {name: {leaf.dtype.name for leaf in jax.tree.leaves(part)} for name, part in parts.items()}
    assert kinds == {"language": {"bfloat16"}, "vae": {"float32"}, "vision": {"float32"}}


@pytest.mark.slow
def test_inference_over_several_devices_says_and_draws_the_same(model_folder, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 256)
    settings = InferenceConfig(
        size=16, steps=2, guidance_scale=1.0, temperature=0.0, max_new_tokens=8, prompt="describe", batch_size=2
    )
    pictures = [scenes.draw(scenes.scene_at("test", index)) for index in range(2)]
    found = []
    for devices in (None, jax.devices()[:4]):
        inference = Inference(ModelConfig(folder=str(model_folder)), settings, devices)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(inference.parts)} == {1 if devices is None else 4}
        found.append(
            list(
                inference.reconstructions(
                    Row(index, index, inference.image_fields(image)) for index, image in enumerate(pictures)
                )
            )
        )
    for (_, caption, drawn), (_, caption_of_four, drawn_of_four) in zip(*found):
        assert caption == caption_of_four
        assert np.abs(drawn.astype(int) - drawn_of_four.astype(int)).max() <= 1
