"""DPG-Bench's grids, cut by the evaluator's own rules, and its results file."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from stand_ins import SIZE, Painter, contents, dpg_pictures, refused, sample_pixels, snapshot

from uae_jax import evaluate
from uae_jax.evaluation import dpg, drawing

PROMPTS = {
    "12": "a long text about a lamp",
    "COCOval2014000000000042": "a longer one about a street",
    "partiprompts7": 'a text, with "quotes"',
}

pytestmark = pytest.mark.usefixtures("painter")


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for stem, text in PROMPTS.items():
        (folder / f"{stem}.txt").write_text(f"{text}\n")
    return folder


def test_the_evaluator_cuts_four_samples_from_every_grid_and_fails_on_none(prompts, tmp_path, capsys):
    evaluate.main(["dpg", "write", f"--prompts={prompts}", f"--out={tmp_path / 'out'}"])
    found, failed = dpg_pictures(tmp_path / "out", SIZE, PROMPTS)
    assert not failed and set(found) == set(PROMPTS)
    for index, (stem, text) in enumerate(sorted(PROMPTS.items())):
        for sample, crop in enumerate(found[stem]):
            np.testing.assert_array_equal(crop, sample_pixels(text, 4 * index + sample))
    evaluate.main(["dpg", "check", str(tmp_path / "out"), f"--prompts={prompts}"])
    assert "3 grids of 4 samples, 8 pixels each" in capsys.readouterr().out


@pytest.mark.parametrize("limit, batch", [(0, 3), (4, 1), (8, 2), (8, 4), (8, 8)])
def test_an_interrupted_folder_is_finished_as_if_nothing_had_happened(prompts, tmp_path, monkeypatch, limit, batch):
    arguments = ["dpg", "write", f"--prompts={prompts}", f"--batch_size={batch}"]
    evaluate.main([*arguments, f"--out={tmp_path / 'whole'}"])
    monkeypatch.setattr(Painter, "limit", limit)
    with pytest.raises(SystemExit):
        evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    before = snapshot(tmp_path / "out")
    assert len(before) == limit // 4
    (tmp_path / "out/.12.png.part").write_bytes(b"\x89PNG")
    assert "move it out" in check_output(prompts, tmp_path / "out")
    monkeypatch.setattr(Painter, "limit", None)
    evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert before.items() <= snapshot(tmp_path / "out").items()
    assert not dpg_pictures(tmp_path / "out", SIZE, PROMPTS)[1]


def check_output(prompts, folder, *more):
    """What a check that must fail prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert "problem" in refused("dpg", "check", folder, f"--prompts={prompts}", *more)
    return printed.getvalue()


def test_check_names_missing_cut_and_strange_files(prompts, tmp_path):
    out = tmp_path / "out"
    evaluate.main(["dpg", "write", f"--prompts={prompts}", f"--out={out}"])
    (out / "12.png").write_bytes((out / "12.png").read_bytes()[:50])
    (out / "partiprompts7.png").unlink()
    (out / "dpg-bench_20260101-000000_results.txt").write_text("")
    told = check_output(prompts, out)
    assert (
        "12.png is not a readable image" in told
        and "partiprompts7.png is missing" in told
        and "results.txt is none of" in told
    )
    assert "COCOval2014000000000042.png is 16 x 16 pixels instead of 32 x 32" in check_output(prompts, out, "--size=16")


def test_bad_input_is_one_line(prompts, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    assert "does not exist" in refused("dpg", "write", f"--prompts={tmp_path / 'none'}", out)
    (tmp_path / "empty").mkdir()
    assert "holds no .txt files" in refused("dpg", "write", f"--prompts={tmp_path / 'empty'}", out)
    (prompts / "v1.5.txt").write_text("a text")
    assert "has a dot in its name" in refused("dpg", "write", f"--prompts={prompts}", out)
    (prompts / "v1.5.txt").unlink()
    (prompts / "none.txt").write_text(" \n")
    assert "none.txt is empty" in refused("dpg", "write", f"--prompts={prompts}", out)
    assert not (tmp_path / "out").exists()


RESULTS = """out, of today/12.png, 1.0, 0.5, 0.0, 0.5, 0.5
out, of today/COCOval2014000000000042.png, 0.75, 0.75, 0.75, 0.75, 0.75
/other/partiprompts7.png, 1.0, 1.0, 1.0, 0.0, 0.75
Model: out
L1 category scores:
\tentity: 80.0
\tglobal: 50.5
L2 category scores:
\tentity - whole: 81.25
\tglobal -: 50.5
Image path: out, of today
Save results to: out, of today/dpg-bench_20260101-000000_results.txt
DPG-Bench score: 66.66666666666666
"""


def test_summary_of_the_evaluators_results(tmp_path, capsys):
    path = tmp_path / "results.txt"
    path.write_text(RESULTS)
    evaluate.main(["dpg", "summary", str(path), f"--output={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["overall"]["value"] == pytest.approx(100 * 2 / 3) and found["overall"]["prompts"] == 3
    assert 50 <= found["overall"]["low"] <= found["overall"]["value"] <= found["overall"]["high"] <= 75
    assert found["categories"] == {"entity": 80.0, "global": 50.5} and found["subcategories"] == {
        "entity - whole": 81.25,
        "global -": 50.5,
    }
    assert found["warnings"] == ["3 prompts were scored; the published benchmark has 1065"]
    assert "66.67" in capsys.readouterr().out


def test_summary_says_what_is_wrong_with_results(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(RESULTS.split("Model:")[0])
    assert any("has not finished" in warning for warning in dpg.summarise(dpg.read_results(path))["warnings"])
    path.write_text(RESULTS.replace("score: 66", "score: 67"))
    assert any("evaluator's total is 67.6" in warning for warning in dpg.summarise(dpg.read_results(path))["warnings"])
    for line, told in (
        ("a.png, 1.0, 0.0, 0.7\n", "line 1 does not hold"),
        ("a.png\n", "line 1 does not hold"),
        ("Model: a\n", "has no scores"),
    ):
        path.write_text(line)
        assert told in refused("dpg", "summary", path)
    assert "does not exist" in refused("dpg", "summary", tmp_path / "none.txt")


def test_grids_put_samples_in_reading_order(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    target = drawing.Target(tmp_path / "a.png", "", (0, 1, 2, 3))
    grid = target.compose([Image.new("RGB", (2, 2), colour) for colour in colours])
    assert [grid.getpixel(at) for at in ((0, 0), (3, 0), (0, 3), (3, 3))] == colours
