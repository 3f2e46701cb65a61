"""A whole run of the four stages: what it leaves, and that stopping does not change it."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from stage_pieces import changed, make_run

from uae_jax import trees
from uae_jax.data.scenes import fact_kinds, scene_at
from uae_jax.methods.trained import with_policy_as_transformer
from uae_jax.settings import frozen
from uae_jax.stages import run as run_module
from uae_jax.stages.checks import stage_identity
from uae_jax.stages.folders.parts import weights_digest
from uae_jax.stages.program import with_adapters
from uae_jax.stages.run_config import RunConfig
from uae_jax.stages.weights import ModelConfig, load_system, model_folder
from uae_jax.training.metrics import read_lines
from uae_jax.training.signals import StopTraining

pytestmark = pytest.mark.usefixtures("all_on_one_device")

STAGES = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
SCORES = (
    "reward",
    "unified_score",
    "heldout_score",
    "caption_tokens",
    "fact_recall",
    "fact_precision",
    "scene_accuracy",
    "geneval",
)


def _fingerprints(parts):
    return {
        name: hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).digest()
        for name, tree in parts.items()
    }


@pytest.fixture(scope="module")
def watched(config, tmp_path_factory):
    """A whole run: its summary, workdir and `Run`, and of each stage the compiled step, the result and the parts it
    changed.
    """
    seen = types.SimpleNamespace(workdir=tmp_path_factory.mktemp("runs") / "whole", steps={}, results={}, changed={})

    class Watched(run_module.Run):
        def train_stage(self, name, *arguments):
            seen.run, seen.stage = self, name
            before = _fingerprints(self.parts)
            seen.results[name] = super().train_stage(name, *arguments)
            after = _fingerprints(self.parts)
            assert before.keys() == after.keys()
            seen.changed[name] = {part for part in after if before[part] != after[part]}
            return seen.results[name]

    build_step = run_module.build_step

    def watched_step(*arguments):
        assert seen.stage not in seen.steps
        return seen.steps.setdefault(seen.stage, build_step(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Run", Watched)
        patch.setattr(run_module, "build_step", watched_step)
        seen.summary = run_module.run(config, seen.workdir)
    return seen


@pytest.fixture(scope="module")
def finished(watched):
    return watched.summary, watched.workdir


@pytest.mark.trap(37)
def test_each_stage_compiles_its_step_once_in_a_whole_run(watched):
    assert {stage: step._cache_size() for stage, step in watched.steps.items()} == dict.fromkeys(STAGES, 1)


@pytest.mark.trap(37)
def test_the_scores_of_all_stages_are_compiled_once(watched):
    evaluator = watched.run.evaluator
    assert [function._cache_size() for function in (evaluator._write, evaluator._picture, evaluator._compare)] == [
        1,
        1,
        1,
    ]


@pytest.mark.trap(13, 14)
def test_every_stage_changes_its_own_parts_only(watched):
    assert watched.changed == {
        "pretrain": {"projector", "transformer"},
        "cold_start": {"projector", "transformer"},
        "gen_for_und": {"language_lora"},
        "und_for_gen": {"transformer_lora"},
    }


def _assert_equal(ours, theirs):
    ours, theirs = trees.flatten(ours), trees.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def test_export_reads_back_bit_for_bit(watched):
    system = load_system(ModelConfig(folder=str(watched.workdir)), image_size=16)
    _assert_equal(system.parts, watched.run.parts)
    assert system.model.captioner.text.lora_alpha == watched.run.system.model.captioner.text.lora_alpha
    assert system.model.transformer.lora_alpha == watched.run.system.model.transformer.lora_alpha
    start = load_system(ModelConfig(folder=watched.run.config.model.folder), image_size=16).parts
    untrained = start.keys() - {"projector", "transformer"}
    assert untrained == {"vision", "language", "vae", "pooled", "encoders"}
    _assert_equal({name: system.parts[name] for name in untrained}, {name: start[name] for name in untrained})


@pytest.mark.trap(29)
def test_the_moving_average_is_scored_and_exported(watched):
    state = watched.results["und_for_gen"].state
    _assert_equal(watched.run.parts["transformer_lora"], state.ema["transformer_lora"])
    raw, average = (
        state_part["transformer_lora"]["last_block"]["attention"]["value"]["b"]
        for state_part in (state.params, state.ema)
    )
    assert np.abs(np.asarray(raw) - np.asarray(average)).max() > 0


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
    for name in (
        "config.json",
        "metrics.jsonl",
        "report.html",
        "summary.json",
        "checkpoints",
        "trained",
        "tensorboard",
        "export/llm",
        "export/dit_lora",
    ):
        assert (workdir / name).exists(), name
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert [(line["stage"], line["step"]) for line in trained] == [(stage, step) for stage in STAGES for step in (1, 2)]
    assert (
        json.loads((workdir / "samples" / "und_for_gen_after" / "samples.json").read_text())[0]["caption"] is not None
    )


def test_rl_stages_report_what_is_not_their_reward(finished):
    summary, workdir = finished
    lines = read_lines(workdir / "metrics.jsonl")
    watched = {line["stage"]: line for line in lines if "eval/reward" in line}
    assert list(watched) == ["gen_for_und", "und_for_gen"] and all(line["step"] == 1 for line in watched.values())
    measured = {name.removeprefix("eval/") for name in watched["gen_for_und"] if name.startswith("eval/")}
    assert measured == {
        "reward",
        "unified_score",
        "heldout_score",
        "caption_tokens",
        "truncated",
        "repetition",
        "fact_recall",
        "fact_precision",
        "scene_accuracy",
        *(f"fact_recall_{kind}" for kind in fact_kinds(scene_at("test", 0, 0))),
    }
    assert measured < set(summary["stages"][0]["after"])
    samples = json.loads((workdir / "samples" / "gen_for_und_step1" / "samples.json").read_text())
    assert len(samples) == 2 and {"clip", "fact_recall"} <= set(samples[0]["scores"])
    for line in lines:
        assert (
            line["stage"] not in watched
            or "loss" not in line
            or {"caption_tokens", "truncated_fraction", "repetition"} <= set(line)
        )


def test_whole_copies_are_not_there_before_their_stage(config, whole):
    model = whole.system.model
    settings = frozen(RunConfig, changed(config, gen_for_und=dict(train="full"), und_for_gen=dict(train="full")))
    parts = {name: whole.parts[name] for name in ("language", "transformer")}
    assert with_adapters(settings, model, parts, jax.random.key(0)).keys() == parts.keys()
    lora = settings.with_stage("und_for_gen", train="lora")
    assert with_adapters(lora, model, parts, jax.random.key(0)).keys() == parts.keys() | {"transformer_lora"}


@pytest.mark.slow
def test_a_stage_that_trains_a_whole_copy_makes_it_of_what_earlier_stages_trained(config, tmp_path):
    """At a rate that moves nothing the copy ends as it began, and the scores are those that the first stage has
    changed.
    """
    still = dict(config["und_for_gen"]["optimizer"], learning_rate=1e-30)
    values = changed(
        config,
        stages=("pretrain", "und_for_gen"),
        und_for_gen=dict(train="full", optimizer=still, flow_grpo=dict(ema_decay=0.0)),
        pretrain=dict(train_projector=False, optimizer=dict(config["pretrain"]["optimizer"], learning_rate=0.05)),
    )
    pretrain, und_for_gen = run_module.run(values, tmp_path / "run")["stages"]
    assert pretrain["before"] != pretrain["after"] == und_for_gen["after"]


def test_finished_stages_leave_what_they_trained_and_the_last_one_can_be_made_longer(finished, config):
    _, workdir = finished
    for stage in STAGES[:-1]:
        assert (workdir / "trained" / stage / "2" / "commit_success.txt").exists()
        assert [path.name for path in (workdir / "checkpoints" / stage).iterdir()] == ["finished.json"]
    assert (workdir / "checkpoints" / STAGES[-1] / "2").is_dir() and not (workdir / "trained" / STAGES[-1]).exists()
    stored = json.loads((workdir / "trained" / "pretrain" / "2" / "state" / "_METADATA").read_text())
    assert {
        json.loads(name.replace("'", '"').replace("(", "[").replace(")", "]"))[0] for name in stored["tree_metadata"]
    } == {
        "projector",
        "transformer",
    }, "no moments"
    with pytest.raises(ValueError, match="pretrain.steps was 2 and is 3"):
        run_module.run(changed(config, pretrain=dict(steps=3)), workdir)


def test_supervised_training_goes_on_from_a_whole_copy():
    copied = with_policy_as_transformer({"transformer": 1, "transformer_policy": 2, "vae": 3})
    assert copied == {"transformer": 2, "vae": 3} == with_policy_as_transformer(copied)


@pytest.mark.slow
def test_running_again_changes_nothing(finished, config, monkeypatch):
    """The export of the last stage is never replaced by one of an earlier stage, which a kill would leave there."""
    summary, workdir = finished
    before, written, write = (workdir / "metrics.jsonl").read_bytes(), [], run_module._write_outputs
    monkeypatch.setattr(
        run_module, "_write_outputs", lambda whole, results: written.append(len(results)) or write(whole, results)
    )
    assert run_module.run(config, workdir) == summary
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert written == [len(STAGES)]


def _stopping(stage):
    """`run_stage` with a SIGTERM after the first step of one stage."""
    run_stage = run_module.run_stage

    def stopped(name, step, **arguments):
        if name == stage:
            arguments["hooks"] = dataclasses.replace(
                arguments["hooks"], on_step=lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None
            )
        return run_stage(name, step, **arguments)

    return stopped


def _scores(summary):
    return [(stage["name"], stage["steps"], stage["before"], stage["after"]) for stage in summary["stages"]]


def _written(workdir):
    """Contents of all exported weights and configurations and of all samples; metrics but for the clock."""
    files = [
        file for folder in ("export", "samples") for file in sorted((workdir / folder).rglob("*")) if file.is_file()
    ]
    metrics = [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("perf/")}
        for line in read_lines(workdir / "metrics.jsonl")
    ]
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}, metrics


@pytest.mark.trap(38)
@pytest.mark.slow
@pytest.mark.parametrize("stages", [("gen_for_und",), STAGES])
def test_stopped_by_sigterm_and_continued_is_bit_equal(finished, config, tmp_path, monkeypatch, stages):
    summary, whole = finished
    for stage in stages:
        with monkeypatch.context() as patch, pytest.raises(StopTraining, match=f"stopped at {stage} step 1") as stop:
            patch.setattr(run_module, "run_stage", _stopping(stage))
            run_module.run(config, tmp_path / "stopped")
        assert stop.value.exit_code == 128 + signal.SIGTERM
    assert _scores(run_module.run(config, tmp_path / "stopped")) == _scores(summary)
    (expected, expected_metrics), (files, metrics) = _written(whole), _written(tmp_path / "stopped")
    assert sum(name.endswith(".safetensors") for name in expected) > 6
    assert files.keys() == expected.keys()
    assert [name for name in expected if files[name] != expected[name]] == []
    assert metrics == expected_metrics


def test_another_configuration_is_refused_and_overwrites_nothing(finished, config):
    _, workdir = finished
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in workdir.rglob("*") if file.is_file()}
    with pytest.raises(
        ValueError, match="another configuration: seed was 0 and is 1; use .*config.json, or a new --workdir"
    ):
        run_module.run(changed(config, seed=1), workdir)
    assert {
        file: (file.stat().st_mtime_ns, file.stat().st_size) for file in workdir.rglob("*") if file.is_file()
    } == before


@pytest.mark.parametrize(
    "stages, message",
    [
        (("und_for_gen",), "checkpoints of the stage cold_start"),
        ((), "checkpoints of the stage cold_start"),
        (("pretrain", "cold_start", "und_for_gen", "gen_for_und"), "another configuration: order was .*gen_for_und"),
    ],
)
def test_other_stages_are_refused_in_a_workdir_and_overwrite_nothing(finished, config, stages, message):
    """A stage read back after other stages than it was trained after would stand on parts that it never saw."""
    _, workdir = finished
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in workdir.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=f"{message}.*new --workdir"):
        run_module.run(changed(config, stages=stages), workdir)
    assert {
        file: (file.stat().st_mtime_ns, file.stat().st_size) for file in workdir.rglob("*") if file.is_file()
    } == before


def test_settings_of_stages_to_come_may_change(config):
    """A correction of the last stage must not cost the first one's days; what a stage saw must be as it was."""

    def identities(**changes):
        settings = frozen(RunConfig, changed(config, **changes))
        return [json.dumps(settings.identity(name), sort_keys=True) for name, _ in settings.order()]

    first = identities()
    assert (
        len(set(first)) == len(STAGES)
        and identities(evaluation=dict(images=3), loop=dict(save_every=1), mesh=dict(fsdp=2)) == first
    )
    assert identities(rounds=2)[: len(STAGES)] == first
    assert [old == new for old, new in zip(first, identities(gen_for_und=dict(kl_weight=0.5)))] == [
        True,
        True,
        False,
        False,
    ]
    assert not set(first) & set(identities(data=dict(detail="mixed"))) and not set(first) & set(identities(seed=1))
    folder = dict(source="folder", folder="pictures")
    assert not set(identities(data=folder)) & set(identities(data=folder, evaluation=dict(images=3))), (
        "held-out images are not trained on"
    )


def test_settings_that_do_not_change_the_method_are_free(config):
    settings = frozen(RunConfig, changed(config, rounds=2))
    free = settings.free("gen_for_und")
    assert {
        "model.folder",
        "model.remat",
        "guard.kl",
        "gen_for_und.micro_batches",
        "gen_for_und.gather_weights",
        "gen_for_und.vae_chunk",
        "gen_for_und.steps",
        "pretrain.micro_batches",
    } <= free
    assert not free & {
        "model.dtype",
        "guard.window",
        "guard.gradient_ratio",
        "data.folder",
        "pretrain.steps",
        "gen_for_und.batch_size",
        "gen_for_und.group_size",
        "gen_for_und.kl_weight",
    }
    assert "gen_for_und.steps" not in settings.free("gen_for_und_2"), "the first round has used them"
    assert "data.folder" in frozen(RunConfig, changed(config, data=dict(source="folder", folder="a"))).free("pretrain")


def test_a_moved_model_is_the_same_and_other_weights_are_not(config, tmp_path):
    settings = frozen(RunConfig, config)
    folder = model_folder(settings.model.folder)
    shutil.copytree(folder, tmp_path / "moved")
    moved = dataclasses.replace(settings, model=dataclasses.replace(settings.model, folder=str(tmp_path / "moved")))
    name, before = settings.order()[0][0], weights_digest(folder)
    identity = stage_identity(settings, name, before)
    assert "model.folder" in settings.free(name) and weights_digest(tmp_path / "moved") == before
    same = stage_identity(moved, name, before)
    assert {**same, "model": {**same["model"], "folder": settings.model.folder}} == identity
    file = next((tmp_path / "moved" / "llm").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    other = stage_identity(moved, name, weights_digest(tmp_path / "moved"))
    key = "contents of model.folder"
    assert key not in settings.free(name) and other[key] != identity[key] == before


def test_scores_are_drawn_through_the_captioner_where_training_does(config, whole, tmp_path):
    assert whole.config.condition() == whole.evaluator.drawing.condition == "reference"
    policy = make_run(changed(config, und_for_gen=dict(condition="policy")), tmp_path)
    assert policy.config.condition() == policy.evaluator.drawing.condition == "policy"
    alone = changed(config, stages=("gen_for_und",), und_for_gen=dict(condition="policy"))
    assert frozen(RunConfig, alone).condition() == "reference"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(gen_for_und=dict(group_sice=4)),
            "config.gen_for_und.group_sice does not exist; did you mean config.gen_for_und.group_size",
        ),
        (dict(stages=("pretrain", "warm_start")), "warm_start"),
        (dict(mesh=dict(data=3)), "does not divide|devices"),
        (dict(evaluation=dict(encoders=("longclip",))), "longclip"),
        (dict(data=dict(source="folder")), "config.data.folder"),
        (
            dict(und_for_gen=dict(optimizer=dict(multipliers=(("decoder", 2.0),)))),
            "und_for_gen: optimizer.multipliers: 'decoder' matches no parameter",
        ),
        (
            dict(stages=("und_for_gen",), und_for_gen=dict(vae_chunk=5)),
            "und_for_gen: a batch of 16 latents cannot be decoded in chunks of 5",
        ),
        (
            dict(stages=("und_for_gen",), und_for_gen=dict(batch_size=3)),
            "und_for_gen: 6 samples of a rollout do not divide into 2 parts of complete groups",
        ),
        (dict(gen_for_und=dict(aggregation="mean")), "config.gen_for_und.aggregation is 'mean'; choose one of"),
    ],
)
def test_wrong_settings_name_themselves_and_write_nothing(config, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_module.run(changed(config, **change), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_programs_are_kept_in_the_workdir_but_not_those_of_a_cpu(tmp_path, monkeypatch):
    name = run_module.CACHE
    before = getattr(jax.config, name)
    try:
        run_module.keep_programs(tmp_path / "compiled")
        assert getattr(jax.config, name) == before
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        run_module.keep_programs(tmp_path / "compiled")
        assert getattr(jax.config, name) == before, "a cache that was set stays"
        jax.config.update(name, None)
        run_module.keep_programs(tmp_path / "compiled")
        jax.jit(lambda x: x @ x + 3)(np.eye(3)).block_until_ready()
        assert any((tmp_path / "compiled").iterdir())
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()
