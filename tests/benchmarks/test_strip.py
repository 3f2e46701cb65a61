"""The README's picture and the animation, of the samples that a run leaves."""

import json
import sys

import pytest
from PIL import Image

from benchmarks import strip


@pytest.fixture
def workdir(tmp_path):
    stages = {"pretrain": ("before", "after"), "gen_for_und": ("before", "step40", "step100", "after")}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": [{"name": name} for name in stages]}))
    for stage, moments in stages.items():
        for moment in moments:
            folder = tmp_path / "samples" / f"{stage}_{moment}"
            folder.mkdir(parents=True)
            names = {"original": "0.png", "reconstruction": "1.png"}
            for number, name in enumerate(names.values()):
                Image.new("RGB", (32, 32), (40 * number, 90, 20)).save(folder / name)
            (folder / "samples.json").write_text(json.dumps([names | {"caption": f"{stage} {moment}"}]))
    return tmp_path


def test_the_moments_of_a_run_are_in_order_and_each_once(workdir):
    titles = [title for title, _ in strip.moments(workdir)]
    said = ["gen_for_und: step 40", "gen_for_und: step 100", "gen_for_und: after"]
    assert titles == ["before training", "pretrain: after", *said]


def test_a_gif_has_a_frame_for_each_moment_and_a_picture_the_first_and_last(workdir, monkeypatch):
    for name in ("all.gif", "ends.png"):
        monkeypatch.setattr(sys, "argv", ["strip", str(workdir), str(workdir / name), "--rows=1"])
        strip.main()
    with Image.open(workdir / "all.gif") as animation, Image.open(workdir / "ends.png") as ends:
        assert getattr(animation, "n_frames", 1) == 5
        assert ends.width == animation.width + strip.TEXT + strip.SIDE + 2 * strip.GAP
