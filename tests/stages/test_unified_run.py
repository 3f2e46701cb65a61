"""One network both ways as a run: checks, steps, scores, report, a stop in between, and an export for transformers."""

import dataclasses
import json
import os
import shutil
import signal

import janus_pieces as pieces
import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration

import uae_jax
from configs import unified_ar
from configs.presets import merged
from uae_jax import convert, main
from uae_jax.hf.safetensors import TensorFolder
from uae_jax.settings import Mistakes, frozen
from uae_jax.stages import checks, kinds
from uae_jax.stages import run as run_module
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import BUILTIN
from uae_jax.training.metrics import read_lines
from uae_jax.training.signals import StopTraining

pytestmark = pytest.mark.usefixtures("all_on_one_device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Janus with the built-in image encoders beside it."""
    place = tmp_path_factory.mktemp("janus") / "model"
    pieces.build(vocabulary=pieces.WORDS).save_pretrained(place)
    pieces.write_tokenizer(place, pieces.WORDS)
    for name in ("clip", "dinov2"):
        shutil.copytree(BUILTIN / name, place / name)
    return place


def config_of(folder, **changes) -> dict:
    small = dict(
        model=dict(folder=str(folder)),
        data=dict(max_caption=12),
        evaluation=dict(images=2, images_during=2, batch_size=2, geneval_per_tag=0, samples=1, guidance_scale=2.0),
        loop=dict(eval_every=0, save_every=1),
        guard=dict(kl=0.0, truncated=0.0, reward_fall=0.0),
        unified_ar=dict(
            steps=2,
            batch_size=2,
            group_size=2,
            images_per_caption=2,
            max_new_tokens=8,
            guidance_scale=2.0,
            lora_rank=2,
            optimizer=dict(learning_rate=0.05, warmup_steps=0),
        ),
    )
    return merged(merged(unified_ar.get_config().to_dict(), small), changes)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return run_module.run(config_of(folder), workdir), workdir


@pytest.mark.trap(54)
def test_a_run_leaves_what_every_run_leaves(folder, finished):
    summary, workdir = finished
    (stage,) = summary["stages"]
    assert stage["name"] == "unified_ar" and stage["steps"] == 2
    names = {"reward", "unified_score", "heldout_score", "fact_recall", "scene_accuracy", "true_caption_scene_accuracy"}
    assert names <= stage["after"].keys() == stage["before"].keys()
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if "reward" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"caption_grad_norm", "image_grad_norm", "image_entropy", "between_share"} <= lines[0].keys()
    assert lines[0]["kl"] == 0 and lines[1]["kl"] > 0
    for name in (
        "report.html",
        "summary.json",
        "export/model.safetensors",
        "export/llm_lora/adapter_model.safetensors",
    ):
        assert (workdir / name).is_file(), name
    before, after = TensorFolder(folder), TensorFolder(workdir / "export")
    assert before.names() == after.names()
    for name in before.names():  # beside its adapter, the network is as it was
        np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    assert (workdir / "samples" / "unified_ar_after" / "000_reconstruction.png").is_file()


@pytest.mark.slow
def test_a_stop_and_the_same_command_are_bit_equal_to_a_run_in_one(folder, finished, tmp_path, monkeypatch):
    run_stage = run_module.run_stage

    def stopped(*positional, **arguments):
        end = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None  # noqa: E731
        arguments["hooks"] = dataclasses.replace(arguments["hooks"], on_step=end)
        return run_stage(*positional, **arguments)

    with monkeypatch.context() as patch, pytest.raises(StopTraining):
        patch.setattr(run_module, "run_stage", stopped)
        run_module.run(config_of(folder), tmp_path / "run")
    run_module.run(config_of(folder), tmp_path / "run")
    ours, theirs = (TensorFolder(place / "export" / "llm_lora") for place in (tmp_path / "run", finished[1]))
    assert ours.names() == theirs.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


def test_the_export_opens_in_transformers_with_equal_logits(finished, tmp_path):
    """The adapter merged by `convert export`, which is what peft would compute; and the network captions with it."""
    _, workdir = finished
    convert.main(["export", str(workdir), str(tmp_path / "merged"), "--merge-adapters"])
    theirs = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    system = kinds.load_system(frozen(RunConfig, config_of(workdir)).model, image_size=32)
    from uae_jax.models.language import model as lm
    from uae_jax.rollouts.unified import weights

    ids, mask = pieces.right_padded(pieces.drawing_prompts()[:1])
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64))).logits
    params, adapter = weights(system.parts, policy=True)
    network = system.model.network
    hidden = lm.text_hidden_states(network, params, adapter, ids, mask)
    assert pieces.relative(lm.logits(network, params, hidden), expected) < 1e-4
    plain = lm.logits(network, params, lm.text_hidden_states(network, params, None, ids, mask))
    assert pieces.relative(plain, expected) > 1e-4  # the adapter is not zero


def test_inference_reads_a_workdir_with_its_settings(finished):
    model = uae_jax.load(finished[1])
    assert (model.settings.size, model.settings.guidance_scale, model.settings.max_new_tokens) == (32, 2.0, 12)
    assert model.generate(["a red cat"])[0].size == (32, 32)
    before = uae_jax.load(finished[1], adapters=False)
    assert before.generate(["a red cat"])[0].tobytes() != model.generate(["a red cat"])[0].tobytes()


def test_check_knows_the_folder_with_all_its_parts(finished, folder, capsys):
    convert.main(["check", str(finished[1])])
    text = capsys.readouterr().out
    assert "one network that captions and draws" in text and "llm_lora" in text and "3 parts" not in text
    convert.main(["check", str(folder), "--json"])
    assert {part["part"] for part in json.loads(capsys.readouterr().out)["parts"]} == {"janus", "clip", "dinov2"}


@pytest.mark.trap(54)
@pytest.mark.slow
def test_full_fine_tuning_leaves_one_network(folder, tmp_path):
    config = config_of(folder, unified_ar=dict(train="full", steps=1, optimizer=dict(learning_rate=1e-3)))
    run_module.run(config, tmp_path / "run")
    export = tmp_path / "run" / "export"
    assert not (export / "llm_lora").exists()
    before, after = TensorFolder(folder), TensorFolder(export)
    changed = {name for name in after.names() if not np.array_equal(before.read(name), after.read(name))}
    assert changed and all("language_model" in name or name.startswith("lm_head") for name in changed)


def test_a_dry_run_says_what_would_run(folder, tmp_path, capsys):
    arguments = ["--config=unified_ar", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    main.main([*arguments, f"--config.model.folder={folder}"])
    text = capsys.readouterr().out
    assert "unified_ar" in text and "GiB a device" in text and "32 x 32 pixels" in text
    main.main([*arguments[:1], "--describe=unified_ar.image"])
    assert "config.unified_ar.image.clip_low" in capsys.readouterr().out


def test_stages_of_the_other_kind_are_refused_in_a_line(folder, tmp_path):
    with pytest.raises(Mistakes, match="gen_for_und does not train what .* its stages are unified_ar"):
        checks.checked_config(config_of(folder, stages=("gen_for_und",)), tmp_path / "run")
    with pytest.raises(Mistakes, match="unified_ar does not train what .* its stages are align, pretrain"):
        checks.checked_config(config_of("", data=dict(image_size=32)), tmp_path / "run")
    with pytest.raises(Mistakes, match="evaluation.questions"):
        checks.checked_config(config_of(folder, evaluation=dict(questions="builtin")), tmp_path / "run")
    with pytest.raises(Mistakes, match="draws 32 pixels alone"):
        checks.checked_config(config_of(folder, data=dict(image_size=64)), tmp_path / "run")
