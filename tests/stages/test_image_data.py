"""Runs on photographs in folders: what is opened, what is refused before weights are read, and a whole short run."""

import functools
import io
import json
import math
import sys

import numpy as np
import photographs
import pytest
from photographs import WRITERS, noise
from PIL import Image
from stage_pieces import exit_of

from configs import presets
from uae_jax import main
from uae_jax.data.images import load_image, square_image
from uae_jax.data.mixture import Mixture
from uae_jax.settings import Mistakes, frozen
from uae_jax.stages import checks
from uae_jax.stages import run as run_module
from uae_jax.stages.data import check_same_images, few_images, open_data
from uae_jax.stages.run_config import RunConfig
from uae_jax.training.metrics import read_lines

pytestmark = pytest.mark.usefixtures("one_device")
JPEGS = ("scaled", "full")
ALL = ("pretrain", "cold_start", "gen_for_und", "und_for_gen")


@pytest.fixture(scope="module")
def photos():
    return photographs.photographs()


@pytest.fixture
def folder(photos, tmp_path):
    photographs.write_images(tmp_path / "photos", photos)
    return tmp_path / "photos"


def settings_of(stages=("gen_for_und",), data=None, **sections):
    """The tiny preset on folders."""
    values = presets.preset("tiny", stages).to_dict()
    return frozen(RunConfig, presets.merged(values, dict(sections, data=dict(source="folder") | (data or {}))))


command = functools.partial(exit_of, main.main)


SHORT = (
    "--config.gen_for_und.steps=2",
    "--config.gen_for_und.batch_size=4",
    "--config.gen_for_und.group_size=2",
    "--config.gen_for_und.sampler_steps=2",
    "--config.gen_for_und.max_new_tokens=6",
    "--config.evaluation.sampler_steps=2",
    "--config.evaluation.batch_size=2",
    "--config.data.max_caption=8",
    "--config.loop.eval_every=0",
    "--config.loop.save_every=0",
)


@pytest.mark.slow
def test_gen_for_und_trains_on_photographs_without_captions(folder, tmp_path, capsys):
    (folder / "copy.jpg").write_bytes((folder / "coffee.jpg").read_bytes())
    (folder / "damaged.jpg").write_bytes((folder / "coins.jpg").read_bytes()[:-300])
    workdir = tmp_path / "run"
    arguments = [f"--config.data.folder={folder}", "--config.data.source=folder", f"--workdir={workdir}", *SHORT]
    assert command("--config=configs/gen_for_und.py", *arguments) == 0
    out, err = capsys.readouterr()
    assert f"data: {folder} is a folder of images without captions (14 images)\n" in out
    left_out = "2 of 14 images are left out: 1 broken (damaged.jpg), 1 of the same bytes as another (copy.jpg)"
    assert out.count(f"data: {left_out}\n") == 1
    assert "fewer than a batch" not in err
    summary = json.loads((workdir / "summary.json").read_text())
    (counts,) = summary["data"]
    assert counts["left_out"] == {"broken": 1, "small": 0, "thin": 0, "duplicate": 1}
    assert (counts["images"], counts["used"], counts["format"]) == (14, 12, "images")
    (stage,) = summary["stages"]
    assert stage["after"]["reward"]["n"] == 1  # a tenth of twelve photographs
    assert not [name for name in stage["after"] if name.startswith("true_caption")]
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    assert (workdir / "report.html").is_file() and (workdir / "export").is_dir()


def test_stages_that_need_captions_name_those_that_do_not(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "load_system", lambda *_, **__: pytest.fail("the weights were read"))
    arguments = [f"--config.data.folder={folder}", "--config.data.source=folder", f"--workdir={tmp_path / 'run'}"]
    assert command("--config=unified_grpo", *arguments, "--config.und_for_gen.data_captions=0") == 1
    first = folder / "astronaut.jpg"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {first} has no caption ({folder} is a folder of images without captions), and pretrain and "
        f"cold_start need captions: write a caption beside every image ({folder / 'astronaut'}.txt), or one "
        "captions.jsonl; gen_for_und, und_for_gen would run without (--config.stages=gen_for_und,und_for_gen)"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, needing",
    [
        ({}, {"pretrain", "cold_start", "und_for_gen"}),
        (dict(und_for_gen=dict(data_captions=0.0)), {"pretrain", "cold_start"}),
        (
            dict(und_for_gen=dict(data_captions=0.0, method="flow_grpo"), gen_for_und=dict(objective="supervised")),
            {"pretrain", "cold_start", "gen_for_und"},
        ),
    ],
)
def test_whether_a_stage_needs_captions_follows_from_its_settings(changes, needing):
    config = settings_of(ALL, **changes)
    assert {stage for stage in ALL if config.needs_captions(stage)} == needing


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "images"])
def test_captioned_formats_serve_every_stage(photos, tmp_path, name):
    WRITERS[name][1](tmp_path / "set", photos)
    config = settings_of(ALL, dict(folder=str(tmp_path / "set")))
    assert checks.find_mistakes(config, None) == []
    data = open_data(config.data, 0, 1)
    assert list(checks.missing_captions(config, data)) == [] and len(data.train) == 11
    assert data.heldout[0].caption and data.heldout[0].id not in {data.train[i].id for i in range(11)}


def test_a_single_image_without_a_caption_is_named_with_its_remedy(photos, tmp_path):
    photographs.write_text_files(tmp_path, photos)
    (tmp_path / "coins.txt").unlink()
    config = settings_of(("pretrain",), dict(folder=str(tmp_path)))
    (line,) = checks.find_mistakes(config, None)
    assert line.startswith(f"{tmp_path / 'coins.jpg'} has no caption") and "pretrain needs captions" in line
    assert f"write a caption into {tmp_path / 'coins.txt'}; gen_for_und would run without" in line
    assert checks.find_mistakes(settings_of(data=dict(folder=str(tmp_path))), None) == []


def test_the_only_image_is_not_held_out_in_silence(tmp_path):
    Image.fromarray(noise(40, 40)).save(tmp_path / "one.png")
    config = settings_of(data=dict(folder=str(tmp_path)))
    (line,) = checks.find_mistakes(config, None)
    assert line.startswith(f"{tmp_path} has a single image that can be used, and it is held out for the scores")
    assert "set config.data.heldout_folder to a folder of others" in line
    other = tmp_path.parent / f"{tmp_path.name}_others"
    other.mkdir()
    for number in range(3):
        Image.fromarray(noise(40, 40, 1 + number)).save(other / f"{number}.png")
    data = open_data(settings_of(data=dict(folder=str(tmp_path), heldout_folder=str(other))).data, 0, 2)
    assert len(data.train) == 1 and [example.id for example in data.heldout] == ["0.png", "1.png"]
    assert len(data.records()) == 2 and data.trained_folders == 1
    # a second image that is bad leaves one
    (tmp_path / "two.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="has a single image that can be used"):
        open_data(config.data, 0, 2)


def test_images_are_read_as_squares_and_large_jpegs_small(tmp_path):
    large = noise(400, 300)
    Image.fromarray(large).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(noise(40, 40)).save(tmp_path / "little.png")
    scaled, full = (open_data(settings_of(data=dict(folder=str(tmp_path), jpeg=jpeg)).data, 0, 1) for jpeg in JPEGS)
    (of_scaled, of_full) = (data.train[0].image for data in (scaled, full))
    assert of_scaled.shape == of_full.shape == (32, 32, 3) and (of_scaled != of_full).any()
    np.testing.assert_array_equal(of_full, square_image(load_image(tmp_path / "large.jpg"), 32))
    np.testing.assert_array_equal(scaled.heldout[0].image, square_image(noise(40, 40), 32))


def test_threads_and_workers_may_change_when_a_run_continues():
    free = settings_of(("pretrain",)).free("pretrain")
    assert {"data.threads", "data.workers"} <= free and "data.jpeg" not in free


def test_fewer_images_than_a_batch_are_told(folder):
    config = settings_of(("pretrain", "gen_for_und"), dict(folder=str(folder)), gen_for_und=dict(batch_size=12))
    data = open_data(config.data, 0, 1, check=False)
    assert list(few_images(config, data.train)) == [
        "pretrain: there are 11 training images, fewer than a batch of 64, which then holds an image more than once; "
        "set config.pretrain.batch_size to 11 or less, or add images",
        "gen_for_und: there are 11 training images, fewer than a batch of 12, which then holds an image more than "
        "once; set config.gen_for_und.batch_size to 11 or less, or add images",
    ]


def test_a_mixture_of_formats_holds_out_of_each(photos, tmp_path):
    names = list(photos)
    photographs.write_images(tmp_path / "a", {name: photos[name] for name in names[:8]})
    photographs.write_webdataset(tmp_path / "b", {name: photos[name] for name in names[8:]})
    mixed = (f"{tmp_path / 'a'}=3", f"{tmp_path / 'b'}=1")
    config = settings_of(data=dict(mixture=mixed))
    data = open_data(config.data, 0, 4)
    assert isinstance(data.train, Mixture) and [len(source) for source in data.train.sources] == [7, 3]
    assert [example.id for example in data.heldout] == [names[7], "00000.tar key rocket"]
    numbers = [data.train.place_of(index)[0] for index in range(8)]
    assert sorted(numbers) == [0] * 6 + [1] * 2 and len(data.lines) == len(data.records()) == 2
    assert data.train[0].caption is None or data.train[0].id.startswith("00000.tar")
    wanting = settings_of(("pretrain",), dict(mixture=mixed))
    (line,) = checks.find_mistakes(wanting, None)
    assert line.startswith(f"{tmp_path / 'a' / names[0]} has no caption")


def test_a_mixture_is_read_from_the_command_line(folder, tmp_path, capsys):
    other = tmp_path / "others"
    photographs.write_images(other, photographs.photographs(3, 40))
    arguments = ["--config=gen_for_und", "--config.data.source=folder", f"--workdir={tmp_path / 'run'}", "--dry_run"]
    assert command(*arguments, f"--config.data.mixture={folder}=0.7,{other}=0.3") == 0
    out = capsys.readouterr().out
    assert f"data: {folder} is a folder of images without captions (12 images)" in out
    assert f"data: {other} is a folder of images without captions (3 images)" in out
    assert "astronaut.jpg: 32 x 32 pixels, no caption" in out


@pytest.mark.parametrize(
    "data, message",
    [
        (dict(mixture=("a",)), "mixture has the entry 'a'; write FOLDER=WEIGHT"),
        (dict(mixture=("a=0",)), "mixture has the entry 'a=0'; write FOLDER=WEIGHT, with a weight above 0"),
        (dict(mixture=("=1", "b=nan")), "mixture has the entry '=1'.*\n.*mixture has the entry 'b=nan'"),
        (dict(mixture=("a=1",), folder="b"), "folder='b' cannot be set beside it"),
        (dict(mixture=("a=1",), source="scenes"), "source='scenes' cannot be set beside it"),
        (dict(format="zip"), "format is 'zip'; choose one of"),
        (dict(max_aspect=0.5), "max_aspect is 0.5; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_named(data, message):
    with pytest.raises(Mistakes, match=message):
        settings_of(data=data)


def test_the_dry_run_goes_on_after_a_bad_image(folder, tmp_path, capsys):
    (folder / "astronaut.jpg").write_bytes(b"nothing")
    arguments = ["--config=gen_for_und", "--config.data.source=folder", f"--config.data.folder={folder}"]
    assert command(*arguments, f"--workdir={tmp_path / 'run'}", "--dry_run") == 0
    out = capsys.readouterr().out
    assert f"row 0 would be left out or refused: {folder / 'astronaut.jpg'} is not a readable image" in out
    assert "brick.jpg: 32 x 32 pixels, no caption" in out


def test_a_run_is_not_continued_on_other_images(photos, folder, tmp_path, capsys):
    def opened():
        return open_data(settings_of(data=dict(folder=str(folder))).data, 0, 1)

    (tmp_path / "run").mkdir()
    before = opened()
    check_same_images(tmp_path / "run", before)
    check_same_images(tmp_path / "run", opened())
    (folder / "later.png").write_bytes(b"left out, and so no other data")
    check_same_images(tmp_path / "run", opened())
    (folder / "zebra.jpg").write_bytes(photographs.photographs(1, 60)["astronaut.jpg"])
    with pytest.raises(ValueError, match=r"began \(12 then, 13 now, or other names\): it cannot continue at the same"):
        check_same_images(tmp_path / "run", opened())
    (folder / "zebra.jpg").unlink()
    assert "other contents" not in capsys.readouterr().err
    (folder / "astronaut.jpg").write_bytes(photographs.photographs(1, 60)["astronaut.jpg"])
    check_same_images(tmp_path / "run", opened())
    assert "have the names of those with which the run began, and other contents" in capsys.readouterr().err
    check_same_images(tmp_path / "run", opened())
    assert not capsys.readouterr().err  # said once
    scenes = open_data(frozen(RunConfig, presets.preset("tiny", ()).to_dict()).data, 0, 1)
    check_same_images(tmp_path / "scenes", scenes)  # nothing to note, and nothing written
    note = tmp_path / "run" / "data.json"
    assert json.loads(note.read_text())[0]["images"] == 12
    for content in ("", "[3]", '{"images": 1}'):
        note.write_text(content)
        with pytest.raises(ValueError, match="data.json is damaged .*; delete it"):
            check_same_images(tmp_path / "run", before)


def test_names_that_a_terminal_cannot_print_end_nothing(capsys, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), "latin-1") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_module.tell(["data: caf\udce9.jpg", "data: \u732b.png"], ["mind this"])
        run_module.tell(["data: new\nline\x1b[31m.jpg"], [])
        assert out.buffer.getvalue() == (b"data: caf\\udce9.jpg\ndata: \\u732b.png\ndata: new\\nline\\x1b[31m.jpg\n")
    assert capsys.readouterr().err == "note: mind this\n"
