"""A whole run of the four stages: what it leaves, and that stopping does not change it."""

import json
import os
import signal

import numpy as np
import pytest
from stage_pieces import changed

from uae_jax.stages import run as run_module
from uae_jax.stages.weights import ModelConfig, load_system
from uae_jax.training import loop
from uae_jax.training.signals import StopTraining

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
SCORES = ("reward", "unified_score", "heldout_score", "caption_tokens", "fact_recall", "fact_precision", "scene_accuracy", "geneval")


COMPILED = {}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    step = run_module.Run.step

    def recorded(self, stage, state, optimizer):
        COMPILED[stage] = step(self, stage, state, optimizer)
        return COMPILED[stage]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Run, "step", recorded)
        return run_module.run(config, workdir), workdir


@pytest.mark.usefixtures("finished")
def test_each_stage_compiles_its_step_once_in_a_whole_run():
    assert {stage: step._cache_size() for stage, step in COMPILED.items()} == dict.fromkeys(STAGES, 1)


def test_summary_has_all_stages_with_scores_before_and_after(finished):
    summary, workdir = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    for stage in summary["stages"]:
        assert stage["steps"] == 2 and stage["seconds"] > 0
        for when in ("before", "after"):
            assert set(SCORES) <= set(stage[when])
            assert all(set(score) == {"value", "n", "low", "high"} for score in stage[when].values())
    for earlier, later in zip(summary["stages"], summary["stages"][1:]):
        assert earlier["after"] == later["before"]


def test_workdir_holds_what_the_readme_says(finished):
    _, workdir = finished
    for name in ("config.json", "metrics.jsonl", "report.html", "summary.json", "checkpoints", "tensorboard", "export/llm", "export/dit_lora"):
        assert (workdir / name).exists(), name
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(stage, step) for stage in STAGES for step in (1, 2)]
    assert json.loads((workdir / "samples" / "und_for_gen_after" / "samples.json").read_text())[0]["caption"] is not None


def test_export_opens_again_with_the_trained_adapters(finished):
    _, workdir = finished
    system = load_system(ModelConfig(folder=str(workdir)), image_size=16)
    assert np.abs(system.parts["language_lora"]["layers"]["attention"]["query"]["b"]).max() > 0
    assert np.abs(system.parts["transformer_lora"]["last_block"]["attention"]["value"]["b"]).max() > 0


def test_running_again_changes_nothing(finished, config):
    summary, workdir = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    assert run_module.run(config, workdir) == summary
    assert (workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("stage", ["gen_for_und", "und_for_gen"])
def test_stopped_by_sigterm_and_continued_is_bit_equal(finished, config, tmp_path, monkeypatch, stage):
    _, whole = finished
    workdir, original = tmp_path / "stopped", loop.Checkpoints.save
    run_stage = run_module.run_stage

    def stop_after_first_step(name, step, **arguments):
        if name == stage:
            hooks = arguments["hooks"]
            arguments["hooks"] = loop.Hooks(
                before=hooks.before, after=hooks.after,
                on_step=lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None)
        return run_stage(name, step, **arguments)

    monkeypatch.setattr(run_module, "run_stage", stop_after_first_step)
    with pytest.raises(StopTraining, match=f"stopped at {stage} step 1") as stop:
        run_module.run(config, workdir)
    assert stop.value.exit_code == 128 + signal.SIGTERM and loop.Checkpoints.save is original
    monkeypatch.setattr(run_module, "run_stage", run_stage)
    run_module.run(config, workdir)
    for file in sorted((whole / "export").rglob("*.safetensors")):
        assert file.read_bytes() == (workdir / file.relative_to(whole)).read_bytes(), file.name


def test_another_configuration_is_refused_in_the_same_workdir(finished, config):
    _, workdir = finished
    with pytest.raises(ValueError, match="another configuration"):
        run_module.run(changed(config, seed=1), workdir)


@pytest.mark.parametrize("change, message", [
    (dict(gen_for_und=dict(group_sice=4)), "did you mean config.gen_for_und.group_size"),
    (dict(stages=("pretrain", "warm_start")), "warm_start"), (dict(mesh=dict(data=3)), "does not divide|devices"),
    (dict(evaluation=dict(encoders=("longclip",))), "longclip"), (dict(data=dict(source="folder")), "config.data.folder")])
def test_wrong_settings_name_themselves_and_write_nothing(config, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_module.run(changed(config, **change), tmp_path / "new")
    assert not (tmp_path / "new").exists()
