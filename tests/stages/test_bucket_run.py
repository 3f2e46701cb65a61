"""Whole runs by URL: data, weights, workdir and exports in a bucket give the bytes of a run on local folders."""

import dataclasses
import functools
import os
import signal

import jax
import photographs
import pytest
from buckets import served
from stage_pieces import changed, exit_of

from uae_jax import convert, main
from uae_jax.files.paths import to_path
from uae_jax.stages import export as export_module
from uae_jax.stages import run as run_module
from uae_jax.stages.checks import find_mistakes, read_config
from uae_jax.stages.export import export_system
from uae_jax.stages.folders import files
from uae_jax.stages.folders.parts import weights_digest
from uae_jax.training.metrics import read_lines
from uae_jax.training.signals import StopTraining

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("local")
    photographs.write_captions(place / "photos", photographs.photographs())
    return place / "photos", model_folder


@pytest.fixture
def store(folders):
    with served("lab") as found:
        for folder, name in zip(folders, ("photos", "model")):
            found.upload_folder(folder, "lab", name)
        yield found


def on(config, photos, model, stages):
    data = dict(source="folder", folder=str(photos))
    return changed(config, stages=stages, data=data, model=dict(folder=str(model)))


def stopping(monkeypatch):
    """A SIGTERM after the first step of a stage."""
    run_stage = run_module.run_stage

    def stopped(name, step, **arguments):
        hooks = arguments["hooks"]
        kill = lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == 1 else None
        return run_stage(name, step, **arguments | {"hooks": dataclasses.replace(hooks, on_step=kill)})

    monkeypatch.setattr(run_module, "run_stage", stopped)


CARD = "README.md"  # names the folder that was read


def local_contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def logged(workdir):
    return [
        {name: value for name, value in line.items() if name != "seconds" and not name.startswith("perf/")}
        for line in read_lines(workdir / "metrics.jsonl")
    ]


def check_same_run(store, config, folders, workdir, stages, monkeypatch):
    """Compares a local run with one by URL that is stopped once, and continued."""
    expected = run_module.run(on(config, *folders, stages), workdir)
    values, bucket = on(config, "gs://lab/photos", "gs://lab/model", stages), to_path("gs://lab/runs/a")
    with monkeypatch.context() as patch, pytest.raises(StopTraining, match="stopped at .* step 1"):
        stopping(patch)
        run_module.run(values, bucket)
    found = run_module.run(values, bucket)
    scores = [[(stage["before"], stage["after"]) for stage in summary["stages"]] for summary in (found, expected)]
    assert scores[0] == scores[1]
    for name in ("export", "samples"):
        ours, theirs = store.contents("lab", f"runs/a/{name}/"), local_contents(workdir / name)
        assert ours.keys() == theirs.keys() and len(ours) > 3
        assert [file for file in ours if ours[file] != theirs[file] and file != CARD] == []
    assert logged(bucket) == logged(workdir)
    left = {name.split("/")[2] for name in store.names("lab", "runs/a/")}
    assert left == {path.name for path in workdir.iterdir()}
    assert b"<html" in store.contents("lab")["runs/a/report.html"]


@pytest.mark.slow
def test_a_run_by_url_stops_continues_and_ends_with_the_bytes_of_a_local_one(
    store, config, folders, tmp_path, monkeypatch
):
    check_same_run(store, config, folders, tmp_path / "run", ("pretrain",), monkeypatch)


@pytest.mark.slow
def test_so_do_all_stages(store, config, folders, tmp_path, monkeypatch):
    stages = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")
    check_same_run(store, config, folders, tmp_path / "run", stages, monkeypatch)


def test_an_export_into_a_bucket_is_that_of_a_folder_and_a_kill_is_mended(
    store, whole, model_folder, tmp_path, monkeypatch
):
    parts = jax.device_get(whole.parts)
    export_system(whole.system, parts, tmp_path / "export")
    expected, out = local_contents(tmp_path / "export"), to_path("gs://lab/run/export")
    (out / "older.txt").write_text("of an older export")
    copies = []

    def killed(source, target):
        copies.append(target)
        if len(copies) == 4:
            raise KeyboardInterrupt
        return copy(source, target)

    # a kill while tensors are written leaves the older export
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(export_module, "_write_captioner_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        export_system(whole.system, parts, out)
    assert store.contents("lab", "run/export/") == {"older.txt": b"of an older export"}
    # a kill between the copies of the complete export is mended by the next look
    copy = files.paths.copy_file
    within = files._copied_over
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            files,
            "_copied_over",
            lambda fresh, target: (patch.setattr(files.paths, "copy_file", killed), within(fresh, target)),
        )
        export_system(whole.system, parts, out)
    assert store.contents("lab", "run/export/") != expected
    files.step_back(out)
    assert store.contents("lab", "run/export/") == expected
    assert not store.names("lab", "run/.export")
    assert weights_digest(out) == weights_digest(tmp_path / "export")


def test_convert_checks_and_exports_by_url(store, model_folder, tmp_path, capsys):
    command = functools.partial(exit_of, convert.main)
    assert command("check", "gs://lab/model") == 0
    told = capsys.readouterr().out
    assert command("check", str(model_folder)) == 0
    assert told == capsys.readouterr().out.replace(str(model_folder), "gs://lab/model")
    store.forget()
    assert command("export", "gs://lab/model", "gs://lab/hub", "--layout=hub") == 0
    assert command("export", str(model_folder), str(tmp_path / "hub"), "--layout=hub") == 0
    ours, theirs = store.contents("lab", "hub/"), local_contents(tmp_path / "hub")
    assert ours.keys() == theirs.keys() and [file for file in ours if ours[file] != theirs[file]] == [CARD]
    assert model_folder.name.encode() in theirs[CARD] and model_folder.name.encode() not in ours[CARD]


def test_what_cannot_be_reached_is_named_before_anything_is_read(store, config, folders):
    def mistakes(photos, workdir):
        values = on(config, photos, "gs://lab/model", ("gen_for_und",))
        return find_mistakes(read_config(values)[0], to_path(workdir))

    assert mistakes("gs://lab/photos", "gs://lab/run") == []
    absent = "does not exist, or this account does not see it; make it first"
    assert mistakes("gs://nowhere/photos", "gs://none/run") == [
        f"gs://nowhere/photos: the bucket gs://nowhere {absent}",
        f"gs://none/run: the bucket gs://none {absent}",
    ]
    (line,) = mistakes("gs://lab/photos", "s3://lab/run")
    assert line.startswith("--workdir=s3://lab/run: Orbax writes no checkpoints to this kind of bucket; give a folder")
    store.refused = {"write"}
    (line,) = mistakes("gs://lab/photos", "gs://lab/run")
    assert line.startswith("gs://lab/run: no permission (Forbidden") and "gcloud auth" in line and "\n" not in line


def test_a_dry_run_reads_by_url_and_leaves_nothing(store, capsys):
    before = store.names("lab")
    words = ["--config=gen_for_und", "--dry_run", "--workdir=gs://lab/run", "--config.model.folder=gs://lab/model"]
    data = ["--config.data.source=folder", "--config.data.folder=gs://lab/photos", "--config.data.max_prompt=0"]
    assert exit_of(main.main, *words, *data, "--config.evaluation.questions=") == 0
    assert "workdir: gs://lab/run (new)" in capsys.readouterr().out
    assert store.names("lab") == before
