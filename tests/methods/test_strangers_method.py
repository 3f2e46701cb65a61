"""A method from outside of the package is one line of registration: it is then described, checked and trained."""

import sys

import jax
import numpy as np
import pytest

from uae_jax import main, sharding
from uae_jax.files.json_files import read_json
from uae_jax.methods.method import STAGES
from uae_jax.stages.weights import ModelConfig, load_system
from uae_jax.training.metrics import read_lines

SMALL = (
    "--config.evaluation.images=2",
    "--config.evaluation.images_during=1",
    "--config.evaluation.batch_size=2",
    "--config.evaluation.sampler_steps=1",
    "--config.evaluation.geneval_per_tag=0",
    "--config.evaluation.samples=1",
    "--config.data.max_caption=8",
    "--config.loop.eval_every=0",
)
STAGE = """from toy_methods import Brightness

from configs import presets
from uae_jax.methods import add_stage

add_stage("brightness", Brightness)


def get_config(preset=None):
    return presets.preset(preset, ("brightness",))
"""
METHOD = """from toy_methods import WeightedFlow

from configs import presets
from uae_jax.methods import add_method

add_method("und_for_gen", "weighted", WeightedFlow)


def get_config(preset=None):
    config = presets.preset(preset, ("und_for_gen",))
    config.und_for_gen.method = "weighted"
    return config
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """On one device; what a test registers is gone after it."""
    make_mesh, methods = sharding.make_mesh, dict(STAGES["und_for_gen"].methods)
    monkeypatch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, devices or jax.devices()[:1]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    STAGES.pop("brightness", None)
    STAGES["und_for_gen"].methods.clear()
    STAGES["und_for_gen"].methods.update(methods)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 1
    return capsys.readouterr().err.strip()


def trained(workdir, stage):
    """Metrics of the stage's steps, and the exported parts."""
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if line["stage"] == stage and "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and (workdir / "report.html").exists()
    (summary,) = read_json(workdir, "summary.json")["stages"]
    assert (summary["name"], summary["steps"], summary["guard"]) == (stage, 3, None)
    return lines, load_system(ModelConfig(folder=str(workdir)), image_size=32).parts


def test_a_stage_from_outside_is_described_checked_and_trained(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(STAGE)
    main.main([f"--config={config}", "--describe=brightness.target"])
    assert capsys.readouterr().out.splitlines() == [
        "config.brightness.target: float = 1.0",
        "    what the mean brightness, 0 to 1, is multiplied by (above 0)",
    ]
    wrong = error_of(capsys, f"--config={config}", "--describe", "--config.brightness.target=-1")
    assert wrong == "error: config.brightness.target is -1.0; it must be above 0"

    workdir = tmp_path / "run"
    main.main([f"--config={config}", f"--workdir={workdir}", "--config.brightness.target=8", *SMALL])
    lines, parts = trained(workdir, "brightness")
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert read_json(workdir)["brightness"]["target"] == 8.0
    start = load_system(ModelConfig(), image_size=32).parts
    before, after = (model["projector"]["second"]["bias"] for model in (start, parts))
    assert np.abs(before).max() < 8 * min(line["brightness"] for line in lines)
    np.testing.assert_allclose(after - before, 0.03, atol=0.003)  # three steps of Adam at its first rate
    for name in ("language", "transformer"):
        jax.tree.map(np.testing.assert_array_equal, parts[name], start[name])
    assert "another configuration: brightness.target was 8.0 and is 1.0; use" in error_of(
        capsys, f"--config={config}", f"--workdir={workdir}", *SMALL
    )


@pytest.mark.slow
def test_a_method_from_outside_trains_the_decoder(tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(METHOD)
    wrong = error_of(capsys, f"--config={config}", "--describe", "--config.und_for_gen.method=weihgted")
    assert wrong == "error: config.und_for_gen.method is 'weihgted'; choose one of flow_grpo, nft, weighted"

    workdir = tmp_path / "run"
    settings = dict(steps=3, batch_size=2, group_size=2, max_new_tokens=4, sampler_steps=1, train="lora")
    own = {"weighted.sharpness": 1.0, "weighted.updates_per_rollout": 2}
    flags = [f"--config.und_for_gen.{name}={value}" for name, value in {**settings, **own}.items()]
    main.main([f"--config={config}", f"--workdir={workdir}", *flags, *SMALL])
    lines, parts = trained(workdir, "und_for_gen")
    assert all(0 < line["weight_max"] <= 1 and np.isfinite(line["reward"]) and line["grad_norm"] > 0 for line in lines)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(parts["transformer_lora"])) > 0
    start = load_system(ModelConfig(), image_size=32).parts
    jax.tree.map(np.testing.assert_array_equal, parts["transformer"], start["transformer"])
    assert read_json(workdir)["und_for_gen"]["weighted"]["sharpness"] == 1.0


def test_nothing_is_left_of_methods_from_outside():
    assert list(STAGES) == ["align", "pretrain", "cold_start", "gen_for_und", "und_for_gen", "unified_ar"]
    assert list(STAGES["und_for_gen"].methods) == ["flow_grpo", "nft", "joint", "matching"]
