"""The official script's matching rules, and the JSON-lines file that survives a kill."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from uae_jax.evaluation.pairs import find_images, match_images, read_rgb
from uae_jax.evaluation.records import RecordLog
from uae_jax.files.json_files import read_records


def paths(*names):
    return [pathlib.Path(name) for name in sorted(names)]


@pytest.mark.parametrize(
    "picture, references, found",
    [
        ("gen/7.png", ("ref/7.jpg", "ref/7.png"), "ref/7.png"),  # the same file name wins over the same stem
        ("gen/7.png", ("ref/17.png", "ref/7.jpg"), "ref/7.jpg"),
        ("gen/recon_7.png", ("ref/7.jpg", "ref/8.jpg"), "ref/7.jpg"),
        ("gen/recon_7.png", ("ref/recon_7.jpg", "ref/7.jpg"), "ref/7.jpg"),  # whichever comes first by path
        ("gen/deep/7.png", ("ref/other/7.webp",), "ref/other/7.webp"),
        ("gen/7.png", ("ref/recon_7.png",), None),  # the prefix is the image's
        ("gen/7.png", ("ref/07.png",), None),
    ],
)
def test_matching_rules(picture, references, found):
    pairs = match_images(paths(picture), paths(*references))
    assert [str(reference) for _, reference in pairs.found] == ([found] if found else [])
    if len(references) == 1 or found is None:
        assert len(pairs.unmatched) == (0 if found else 1 + len(references))


def test_names_that_fit_twice_are_told():
    pairs = match_images(paths("gen/a/0.png", "gen/b/0.png"), paths("ref/a/0.png", "ref/b/0.png"))
    assert [(str(a), str(b)) for a, b in pairs.found] == [("gen/a/0.png", "ref/a/0.png")]
    assert "0.png matches 2 references" in pairs.warnings[0] and "same name: gen/a/0.png" in pairs.unmatched[0][1]


def test_images_are_read_as_the_script_reads_them(tmp_path):
    half = np.zeros((4, 6, 4), np.uint8)
    half[..., 0], half[..., 3] = 200, 128
    Image.fromarray(half, "RGBA").save(tmp_path / "a.png")
    Image.fromarray(half[..., 0]).save(tmp_path / "b.BMP")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "b.BMP"]
    assert np.asarray(read_rgb(tmp_path / "a.png"))[0, 0].tolist() == [
        200,
        0,
        0,
    ]  # transparency is dropped, not laid on white
    (tmp_path / "c.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="c.png is not a readable image"):
        read_rgb(tmp_path / "c.png")


@pytest.mark.parametrize("tail", [b"", b'{"n": 2', b'{"n": 2}', b'{"text": "caf\xc3'])
def test_a_log_that_was_cut_off_goes_on_with_whole_lines(tail, tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    with RecordLog(path) as log:
        log.append({"n": 0, "text": "caf\u00e9\u2028"})
        log.append({"n": 1})
    path.write_bytes(path.read_bytes() + tail)
    with RecordLog(path) as log:
        before = [record["n"] for record in log.records]
        log.append({"n": 9})
    assert before == ([0, 1, 2] if tail.endswith(b"}") else [0, 1])
    assert [record["n"] for record in read_records(path)] == [*before, 9]
    assert read_records(path)[0]["text"] == "caf\u00e9\u2028"


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"n": 0}\nnonsense\n{"n": 1}\n')
    with pytest.raises(ValueError, match="log.jsonl line 2 is not JSON"):
        read_records(tmp_path / "log.jsonl")
