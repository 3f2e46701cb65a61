"""A captioner and a decoder with its own text encoder: imported, checked, trained, continued, exported and used."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from flux2_pieces import write_pipeline
from imported_decoders import DROPPED, imported, joined
from peft import PeftModel
from PIL import Image
from safetensors.numpy import load_file
from stage_pieces import changed, exit_of
from transformers import Qwen2_5_VLForConditionalGeneration

from uae_jax import convert, infer, trees
from uae_jax.data.tokenizer import load_tokenizer
from uae_jax.models.qwen_image import decoder as qwen_image
from uae_jax.stages import run as run_module
from uae_jax.stages.checks import check_run
from uae_jax.stages.evaluation import other_ids
from uae_jax.stages.folders.check import check_folder
from uae_jax.stages.folders.parts import find_parts
from uae_jax.stages.weights import ModelConfig, load_system

pytestmark = pytest.mark.usefixtures("all_on_one_device")

SIDE = 16


@pytest.fixture(scope="module")
def pipeline(model_folder, tmp_path_factory):
    """A tiny klein with the captioner's vocabulary."""
    folder, tokenizer = tmp_path_factory.mktemp("klein"), load_tokenizer(model_folder / "llm_processor")
    write_pipeline(folder, tokenizer, distilled=True, seed=5)
    return folder


@pytest.fixture(scope="module")
def folder(model_folder, pipeline, tmp_path_factory):
    """The model folder that `convert import` makes of captioner and decoder."""
    return joined(model_folder, pipeline, tmp_path_factory.mktemp("imported") / "model")


@pytest.fixture(scope="module")
def settings(config, folder):
    """One RL stage on the captioner; the decoder needs no stage before."""
    values = changed(config, stages=("gen_for_und",), model=dict(folder=str(folder)), data=dict(negative_prompt=""))
    values = changed(values, gen_for_und=dict(guidance_scale=1.0), evaluation=dict(guidance_scale=1.0))
    return changed(values, loop=dict(eval_every=0, save_every=1), sampler=dict(schedule="diffusers"))


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    return workdir, run_module.run(settings, workdir)


def trained(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return adapter(workdir / "export" / "llm_lora")


def adapter(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return load_file(next(folder.glob("*.safetensors")))


def test_the_imported_folder_is_complete(folder, capsys):
    rows = check_folder(find_parts(folder))
    assert not [problem for row in rows for problem in row.problems]
    found = {row.part: (row.matched, row.expected) for row in rows}
    assert {"llm", "decoder/transformer", "decoder/text_encoder", "decoder/vae", "decoder/scheduler"} <= set(found)
    assert all(matched == expected for matched, expected in found.values())
    assert not (folder / "SD3").exists() and not (folder / "dit").exists()


def test_a_pipeline_alone_is_checked_too(pipeline, capsys):
    convert.main(["check", str(pipeline), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["layout"] == "pipeline" and len(found["parts"]) == 5


@pytest.mark.parametrize("inner", ["text_encoder", "transformer", "vae"])
def test_a_damaged_part_is_named(folder, tmp_path, inner, capsys):
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    stored = next((broken / "decoder" / inner).glob("*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-40])
    assert exit_of(convert.main, "check", str(broken)) == 1
    assert f"decoder/{inner}" in capsys.readouterr().out


def test_a_decoder_of_another_vocabulary_is_refused(model_folder, tmp_path):
    from qwen_words import THINKING, make_tokenizer

    write_pipeline(tmp_path / "klein", make_tokenizer(*THINKING))
    arguments = [f"--llm={model_folder / 'llm'}", f"--llm_processor={model_folder / 'llm_processor'}"]
    said = exit_of(convert.main, "import", *arguments, f"--decoder={tmp_path / 'klein'}", str(tmp_path / "out"))
    assert "another vocabulary than the captioner" in str(said) and not (tmp_path / "out").exists()


def test_two_decoders_are_refused(model_folder, pipeline, tmp_path):
    arguments = [f"--llm={model_folder / 'llm'}", f"--sd3={model_folder / 'SD3'}", f"--decoder={pipeline}"]
    assert "give one of --sd3" in str(exit_of(convert.main, "import", *arguments, str(tmp_path / "out")))


def test_guidance_of_a_distilled_decoder_is_a_mistake_of_the_settings(settings, tmp_path):
    values = changed(settings, gen_for_und=dict(guidance_scale=5.0))
    with pytest.raises(Exception, match="gen_for_und: guidance_scale is 5, but this FLUX.2-klein is distilled"):
        run_module.run(values, tmp_path / "run")


def test_states_of_the_captioner_are_no_condition(settings, tmp_path):
    values = changed(settings, gen_for_und=dict(condition="caption_states"))
    with pytest.raises(Exception, match="has a text encoder of its own; use reference"):
        run_module.run(values, tmp_path / "run")


def test_the_step_of_the_stage_is_traced(settings, tmp_path):
    """The quick sibling of the runs below: settings, folder and the whole compiled step, without computing."""
    found, system = check_run(settings, tmp_path / "run")
    assert found.trains("gen_for_und") == ("language_lora",) and system.model.own_encoder
    assert set(system.parts) >= {"text_encoder", "transformer", "vae", "language_lora"}


def test_stages_that_train_a_projector_are_refused(settings, tmp_path):
    for stage in ("pretrain", "cold_start"):
        with pytest.raises(Exception, match="the model has no projector to train"):
            check_run(changed(settings, stages=(stage,)), tmp_path / "run")


@pytest.mark.slow
def test_two_steps_train_the_captioner_alone(finished, folder):
    workdir, summary = finished
    [stage] = summary["stages"]
    assert stage["steps"] == 2 and stage["before"]["reward"] != stage["after"]["reward"]
    assert 0 <= stage["after"]["other_ids"]["value"] <= 1
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 2 and all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in losses)
    assert any(np.abs(leaf).max() > 0 for name, leaf in trained(workdir).items() if "lora_B" in name)


@pytest.mark.slow
def test_a_continued_run_is_bit_equal(finished, settings, tmp_path):
    run_module.run(changed(settings, gen_for_und=dict(steps=1)), tmp_path / "run")
    run_module.run(settings, tmp_path / "run")
    whole, again = trained(finished[0]), trained(tmp_path / "run")
    assert whole.keys() == again.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], again[name])


@pytest.mark.slow
def test_the_exported_decoder_opens_in_diffusers_unchanged(finished, folder):
    export = finished[0] / "export"
    assert not [problem for row in check_folder(find_parts(export)) for problem in row.problems]
    opened, before = (Flux2KleinPipeline.from_pretrained(place / "decoder") for place in (export, folder))
    assert opened.config.is_distilled
    for name in ("transformer", "vae", "text_encoder"):
        new, old = getattr(opened, name).state_dict(), getattr(before, name).state_dict()
        assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in old)


@pytest.mark.slow
def test_a_picture_is_reconstructed(finished, tmp_path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(picture)
    infer.main(["reconstruct", str(picture), f"--checkpoint={finished[0]}", f"--out={tmp_path / 'out'}"])
    assert list((tmp_path / "out").glob("*.png"))


def test_the_system_of_the_folder(folder):
    system = load_system(ModelConfig(str(folder)), image_size=SIDE)
    model = system.model
    assert model.own_encoder and model.decoder.distilled and model.latent_shape == (4, 4, 16)
    assert {"text_encoder", "transformer", "vae"} <= set(system.parts) and "pooled" not in system.parts
    assert model.template.total == 512


def test_captions_whose_ids_are_not_the_tokenizers_are_counted(model_folder):
    tokenizer = load_tokenizer(model_folder / "llm_processor")
    plain = tokenizer("red circle", add_special_tokens=False)["input_ids"]
    control = tokenizer.get_vocab()["<|image_pad|>"]
    rows = np.array([plain, [plain[0], control]])
    tokenizer.split_special_tokens = True
    assert other_ids(tokenizer, rows, np.array([2, 2])).tolist() == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name, method", [("klein_base", "nft"), ("z_image", "flow_grpo"), ("qwen_image", "nft")])
def test_a_decoder_goes_the_whole_way(name, method, model_folder, config, tmp_path, monkeypatch):
    """Captioner, then the decoder's adapter; with guidance, from import to peft, and stopped in between."""
    monkeypatch.setattr(qwen_image, "DROPPED", DROPPED)
    out = imported(name, model_folder, tmp_path)
    convert.main(["check", str(out)])
    values = changed(config, stages=("gen_for_und", "und_for_gen"), model=dict(folder=str(out)))
    values = changed(values, data=dict(negative_prompt="", image_size=32), sampler=dict(schedule="diffusers"))
    values = changed(values, gen_for_und=dict(guidance_scale=3.0, rollout_parts=2), und_for_gen=dict(method=method))
    values = changed(values, loop=dict(eval_every=0), evaluation=dict(guidance_scale=3.0, geneval_per_tag=0))
    stages = run_module.run(values, tmp_path / "run")["stages"]
    assert [stage["steps"] for stage in stages] == [2, 2]
    run_module.run(changed(values, und_for_gen=dict(steps=1)), tmp_path / "again")
    run_module.run(values, tmp_path / "again")
    whole, again = (adapter(tmp_path / name / "export" / "dit_lora") for name in ("run", "again"))
    for leaf in whole:
        np.testing.assert_array_equal(whole[leaf], again[leaf])
    export = tmp_path / "run" / "export"
    assert not [problem for row in check_folder(find_parts(export)) for problem in row.problems]
    pipeline = DiffusionPipeline.from_pretrained(export / "decoder")
    adapted = PeftModel.from_pretrained(pipeline.transformer, export / "dit_lora")
    found = [leaf for leaf_name, leaf in adapted.named_parameters() if "lora_B" in leaf_name]
    assert found and any(leaf.abs().max() > 0 for leaf in found)
    system = load_system(ModelConfig(str(export)), image_size=32)
    assert "transformer_lora" in system.parts and system.model.transformer.lora_alpha > 0
    Qwen2_5_VLForConditionalGeneration.from_pretrained(export / "llm")


@pytest.mark.slow
def test_pretraining_by_an_adapter_leaves_the_decoder_as_it_is(settings, folder, tmp_path):
    adapted = dict(train="lora", train_projector=False, lora_rank=2, steps=2, batch_size=2)
    run_module.run(changed(settings, stages=("pretrain",), pretrain=adapted), tmp_path / "run")
    export = tmp_path / "run" / "export"
    learned = adapter(export / "dit_lora")
    assert any(np.abs(leaf).max() > 0 for name, leaf in learned.items() if "lora_B" in name)
    new, old = (Flux2KleinPipeline.from_pretrained(place / "decoder").transformer for place in (export, folder))
    assert all(torch.equal(leaf, old.state_dict()[name]) for name, leaf in new.state_dict().items())


def test_a_decoder_of_eight_bits_is_read_and_never_trained_as_a_whole(settings, folder, tmp_path):
    values = changed(settings, model=dict(decoder_weights="int8"))
    found, system = check_run(values, tmp_path / "run")
    read = load_system(found.model, image_size=SIDE).parts
    for part in ("transformer", "text_encoder"):
        kinds = {leaf.dtype.name for name, leaf in trees.flatten(read[part]).items() if name.endswith("/kernel")}
        assert kinds == {"int8"} and f"{part}_scales" in system.parts
        assert jax.tree.map(lambda leaf: leaf.shape, read[part]) == jax.tree.map(
            lambda leaf: leaf.shape, system.parts[part]
        )
    whole = changed(values, stages=("und_for_gen",), und_for_gen=dict(train="full"))
    with pytest.raises(Exception, match="und_for_gen trains the transformer, which model.decoder_weights=int8"):
        check_run(whole, tmp_path / "whole")
    with pytest.raises(Exception, match="merge_adapters adds to weights that decoder_weights=int8"):
        check_run(changed(values, model=dict(merge_adapters=True)), tmp_path / "merged")
