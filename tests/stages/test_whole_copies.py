"""Models whose language model or transformer is trained whole: their folders, their precision, and what they cannot be
begun with.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_pieces import changed, exported, largest_gap, make_run, nudged, start_of

from uae_jax import convert, sharding, trees
from uae_jax.data import scenes
from uae_jax.methods.trained import trainable
from uae_jax.nn.lora import merge_adapter
from uae_jax.planning.system import abstract_system
from uae_jax.settings import frozen
from uae_jax.sharding import MeshConfig, make_mesh
from uae_jax.stages import run as run_module
from uae_jax.stages.export import export_system
from uae_jax.stages.inference import Inference, InferenceConfig, Row
from uae_jax.stages.program import make_program
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import ModelConfig, load_system
from uae_jax.training.records import StageResult

SIDE = 16
ADAPTERS = ("language_lora", "transformer_lora")
SETTINGS = InferenceConfig(
    size=SIDE, steps=2, guidance_scale=1.0, temperature=0.0, max_new_tokens=8, prompt="describe", batch_size=1
)


def load(folder, **settings):
    return load_system(ModelConfig(folder=str(folder), **settings), image_size=SIDE)


def assert_same(ours, theirs):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def refused(config, tmp_path, message, **sections):
    with pytest.raises(ValueError, match=message):
        make_run(changed(config, **sections), tmp_path / "run")


@pytest.fixture(scope="module")
def trained(whole, tmp_path_factory):
    """A model whose language model was trained whole, in memory, and its folder."""
    parts = {name: part for name, part in whole.parts.items() if name not in ADAPTERS}
    parts["language_policy"] = nudged(parts["language"], size=0.1)
    folder = tmp_path_factory.mktemp("trained") / "export"
    export_system(whole.system, parts, folder)
    return parts, folder


@pytest.fixture(scope="module")
def adapted(whole, tmp_path_factory):
    """The folder of a model with both adapters."""
    folder = tmp_path_factory.mktemp("adapted") / "export"
    export_system(whole.system, dict(whole.parts) | {name: nudged(whole.parts[name]) for name in ADAPTERS}, folder)
    return folder


def test_policy_and_reference_read_back_bit_for_bit(trained):
    parts, folder = trained
    assert_same(load(folder).parts, parts)
    assert_same(
        load(folder, adapters=False).parts, {name: part for name, part in parts.items() if name != "language_policy"}
    )


def test_the_reference_goes_to_the_mesh_by_the_rules_of_the_whole_model(trained, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 256)
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])
    placed = load_system(ModelConfig(folder=str(trained[1])), image_size=SIDE, mesh=mesh).parts
    expected = trees.flatten(sharding.tree_shardings(placed, mesh))
    assert all(leaf.sharding == expected[name] for name, leaf in trees.flatten(placed).items())
    assert_same(placed, trained[0])


def test_the_folder_says_and_draws_as_the_model_in_memory(trained):
    """Captions are the policy's, and drawings of a text those of the reference's condition."""
    parts, folder = trained
    inference = Inference(ModelConfig(folder=str(folder)), SETTINGS)
    image = scenes.draw(scenes.scene_at("test", 0))

    def results(model):
        inference.parts = model
        [(_, caption, drawn)] = inference.reconstructions([Row(0, 0, inference.image_fields(image))])
        [(_, of_text)] = inference.drawings([Row(0, 0, inference.text_fields("red circle"))])
        return caption, drawn, of_text

    of_folder, in_memory = results(inference.parts), results(parts)
    untrained = results({name: part for name, part in parts.items() if name != "language_policy"})
    policy_alone = results({**parts, "language": parts["language_policy"]})
    assert of_folder[0] == in_memory[0] != untrained[0]
    np.testing.assert_array_equal(of_folder[1], in_memory[1])
    np.testing.assert_array_equal(of_folder[2], untrained[2])
    assert np.any(policy_alone[1] != in_memory[1]) and np.any(policy_alone[2] != untrained[2])


def test_a_later_run_trains_the_copy_on(config, trained, tmp_path):
    parts, folder = trained
    run = make_run(
        changed(config, model=dict(folder=str(folder)), stages=("gen_for_und",), gen_for_und=dict(train="full")),
        tmp_path,
    )
    assert_same(start_of(run, "gen_for_und"), {"language_policy": parts["language_policy"]})
    assert_same(run.parts["language"], parts["language"])


def test_a_copy_that_was_trained_whole_takes_no_adapter(config, trained, tmp_path):
    refused(
        config,
        tmp_path,
        "config.gen_for_und.train is 'lora'.*--config.gen_for_und.train=full, or remove llm_reference",
        model=dict(folder=str(trained[1])),
        stages=("gen_for_und",),
    )
    refused(
        config,
        tmp_path,
        "config.model.merge_adapters.*remove llm_reference",
        model=dict(folder=str(trained[1]), merge_adapters=True),
        stages=("und_for_gen",),
    )
    without = shutil.copytree(trained[1], tmp_path / "without")
    shutil.rmtree(without / "llm_reference")
    run = make_run(changed(config, model=dict(folder=str(without)), stages=("gen_for_und",)), tmp_path)
    assert_same(run.parts["language"], trained[0]["language_policy"])


def test_adapter_and_reference_in_one_folder_are_refused(trained, adapted, tmp_path, capsys):
    folder = shutil.copytree(trained[1], tmp_path / "both")
    shutil.copytree(adapted / "llm_lora", folder / "llm_lora")
    with pytest.raises(ValueError, match="both llm_lora and llm_reference"):
        load(folder)
    with pytest.raises(SystemExit) as stop:
        convert.main(["export", str(folder), str(tmp_path / "out")])
    assert "llm_reference" in stop.value.code and "remove one of them" in stop.value.code
    assert not (tmp_path / "out").exists()


def test_check_and_export_know_the_reference(trained, tmp_path, capsys):
    parts, folder = trained
    convert.main(["check", str(folder), "--json"])
    rows = {row["part"]: row for row in json.loads(capsys.readouterr().out)["parts"]}
    assert rows["llm_reference"]["matched"] == rows["llm_reference"]["expected"] == rows["llm"]["expected"]
    convert.main(["export", str(folder), str(tmp_path / "official")])
    assert_same(load(tmp_path / "official").parts, parts)
    hub = exported(folder, tmp_path / "hub")
    flags = [
        text
        for name in ("llm", "projector", "clip", "dinov2", "llm_reference")
        for text in (f"--{name}", str(hub / name))
    ]
    convert.main(["import", *flags, "--sd3", str(hub / "SD3"), str(tmp_path / "imported")])
    assert_same(load(tmp_path / "imported").parts, parts)


def test_the_transformers_adapter_is_merged_beside_a_reference(trained, adapted, tmp_path):
    folder = shutil.copytree(trained[1], tmp_path / "both")
    shutil.copytree(adapted / "dit_lora", folder / "dit_lora")
    apart = load(folder)
    convert.main(["export", str(folder), str(tmp_path / "merged"), "--merge-adapters"])
    merged = load(tmp_path / "merged").parts
    total = merge_adapter(
        apart.parts["transformer"], apart.parts["transformer_lora"], apart.model.transformer.lora_alpha
    )
    assert largest_gap(merged.pop("transformer"), total) < 1e-6
    assert_same(merged, {name: part for name, part in trained[0].items() if name != "transformer"})


@pytest.mark.parametrize("stage, adapter", [("gen_for_und", "llm_lora"), ("und_for_gen", "dit_lora")])
def test_a_whole_copy_of_a_model_with_an_adapter_is_refused(config, adapted, tmp_path, stage, adapter):
    whole = {name: dict(train="full") for name in ("gen_for_und", "und_for_gen")}
    refused(
        config,
        tmp_path,
        f"config.{stage}.train is 'full'.*{adapter}.*--config.model.merge_adapters=True",
        model=dict(folder=str(adapted)),
        stages=("pretrain", stage),
        **whole,
    )
    merged = make_run(
        changed(
            config, model=dict(folder=str(adapted), merge_adapters=True), stages=("gen_for_und", "und_for_gen"), **whole
        ),
        tmp_path,
    )
    assert not set(ADAPTERS) & set(merged.parts)
    apart = load(adapted)
    for part, alpha in (
        ("language", apart.model.captioner.text.lora_alpha),
        ("transformer", apart.model.transformer.lora_alpha),
    ):
        total = merge_adapter(apart.parts[part], apart.parts[f"{part}_lora"], alpha)
        assert largest_gap(merged.parts[part], total) < 1e-6 < largest_gap(apart.parts[part], total)


def test_adapters_of_the_other_model_train_on(config, adapted, tmp_path):
    captioner = shutil.copytree(adapted, tmp_path / "captioner")
    shutil.rmtree(captioner / "dit_lora")
    model = dict(folder=str(captioner))
    one = make_run(changed(config, model=model, stages=("und_for_gen",)), tmp_path)
    assert set(ADAPTERS) <= set(one.parts)
    turns = make_run(
        changed(config, model=model, stages=("gen_for_und", "und_for_gen"), rounds=2, und_for_gen=dict(train="full")),
        tmp_path,
    )
    assert "language_lora" in turns.parts and "transformer_policy" not in turns.parts


def stages_of(config, monkeypatch, tmp_path):
    """What each stage of a run begins with, when none of them moves anything: parameters and frozen parts by its
    name.
    """
    seen = {}

    def stood_still(name, step, *, state, frozen, **arguments):
        seen[name] = state.params, frozen
        return StageResult(name, state, 0, 0.0, 0.0, {}, {})

    monkeypatch.setattr(run_module, "run_stage", stood_still)
    run = make_run(config, tmp_path)
    for name, stage in run.config.order():
        run.train_stage(name, stage, None, None)
    return seen


def dtypes(part):
    return {leaf.dtype.name for leaf in jax.tree.leaves(part)}


FULL = dict(
    model=dict(frozen_dtype="bfloat16"),
    gen_for_und=dict(train="full"),
    und_for_gen=dict(train="full", flow_grpo=dict(ema_decay=0.0)),
)


def test_whole_copies_begin_as_the_model_was_read(config, monkeypatch, tmp_path):
    config = changed(config, stages=("gen_for_und", "und_for_gen"), rounds=2, **FULL)
    parts, seen = load(config["model"]["folder"]).parts, stages_of(config, monkeypatch, tmp_path)
    for name, copied in (("gen_for_und", "language"), ("und_for_gen", "transformer")):
        for turn in (name, f"{name}_2"):
            assert_same(seen[turn][0], {f"{copied}_policy": parts[copied]})
    held = {
        name: [dtypes(frozen[part]) for part in ("vision", "language", "transformer")]
        for name, (_, frozen) in seen.items()
    }
    half, single = {"bfloat16"}, {"float32"}
    assert held == {
        "gen_for_und": [half, half, single],
        "und_for_gen": [half] * 3,
        "gen_for_und_2": [half] * 3,
        "und_for_gen_2": [half] * 3,
    }


def test_an_earlier_stage_does_not_round_what_is_copied(config, monkeypatch, tmp_path):
    seen = stages_of(changed(config, stages=("und_for_gen", "gen_for_und"), **FULL), monkeypatch, tmp_path)
    alone = stages_of(changed(config, stages=("gen_for_und",), **FULL), monkeypatch, tmp_path)
    assert_same(seen["gen_for_und"][0], alone["gen_for_und"][0])
    assert dtypes(seen["und_for_gen"][1]["language"]) == {"float32"}


def test_plans_hold_the_same_precisions(config, monkeypatch, tmp_path):
    config = changed(config, stages=("gen_for_und", "und_for_gen"), **FULL)
    settings, seen = frozen(RunConfig, config), stages_of(config, monkeypatch, tmp_path)
    system = abstract_system(settings)
    for stage, (params, held) in seen.items():
        program = make_program(settings, system, system.parts, system.batch, stage)
        for planned, real in ((program.state.params, params), (program.frozen, held)):
            assert {name: dtypes(part) for name, part in planned.items()} == {
                name: dtypes(part) for name, part in real.items()
            }


def test_plans_know_the_copy_of_a_folder(config, trained):
    settings = frozen(RunConfig, changed(config, model=dict(folder=str(trained[1])), stages=("und_for_gen",)))
    planned = {
        name: leaf.shape
        for name, leaf in trees.flatten(abstract_system(settings).parts).items()
        if "_lora/" not in name
    }
    assert planned == {name: leaf.shape for name, leaf in trees.flatten(trained[0]).items()}


def test_a_rounded_model_is_copied_in_single_precision(whole):
    rounded = {"transformer": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.parts["transformer"])}
    names = whole.config.with_stage("und_for_gen", train="full").trains("und_for_gen")
    assert names == ("transformer_policy",)
    assert dtypes(trainable(whole.system.model, rounded, names, 4, whole.key)) == {"float32"}


@pytest.mark.slow
def test_the_scores_of_the_folder_are_those_of_the_run(config, tmp_path, monkeypatch):
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make(mesh, devices or jax.devices()[:1]))
    values = changed(config, stages=("gen_for_und",), gen_for_und=dict(train="full", steps=1), loop=dict(eval_every=0))
    [stage] = run_module.run(values, tmp_path / "run")["stages"]
    again = changed(values, stages=(), model=dict(folder=str(tmp_path / "run")))
    [read] = run_module.run(again, tmp_path / "again")["stages"]
    assert stage["before"] != stage["after"] == read["after"]
