"""Unified-Bench with a model first: captions, reconstructions and scores of the built-in model, with and without
interruptions.
"""

import json
import pathlib

import pytest
from PIL import Image

from uae_jax import api, evaluate
from uae_jax.data.scenes import draw, scene_at
from uae_jax.files.json_files import read_records

SETTINGS = ("--steps=2", "--batch_size=2", "--seed=3", "--max_new_tokens=8")


@pytest.fixture(scope="module")
def assets():
    return pathlib.Path(api.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for index in range(5):
        Image.fromarray(draw(scene_at("test", index))).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """The built-in model is loaded and compiled once for each setting."""
    whole, models = api.load, {}

    def load(folder="", **settings):
        key = (folder, *sorted(settings.items()))
        if key not in models:
            models[key] = whole(folder, **settings)
        return models[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "load", load)
        yield


def bench(images, out, assets, *flags):
    evaluate.main(
        [
            "unified_bench",
            f"--images={images}",
            f"--out={out}",
            f"--clip={assets / 'clip'}",
            f"--dinov2={assets / 'dinov2'}",
            *SETTINGS,
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def whole(images, assets, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    bench(images, out, assets)
    return out


def written(out):
    return {path.name: path.read_bytes() for path in (out / "reconstructions").iterdir()}


def test_captions_reconstructions_scores_and_page(whole, images):
    records = read_records(whole / "captions.jsonl")
    assert {record["image"] for record in records} == {f"{index}.png" for index in range(5)}
    results = json.loads((whole / "unified_bench.json").read_text())
    assert (
        results["errors"] == []
        and results["summary"]["models_used"] == ["clip", "dinov2"]
        and results["summary"]["n_valid"] == 5
    )
    page = (whole / "report.html").read_text()
    for record in records:
        assert record["caption"] in page
        assert Image.open(whole / "reconstructions" / f"{record['image_id']}.png").info["caption"] == record["caption"]


@pytest.mark.parametrize("stop", ["caption", "drawing"])
def test_an_interrupted_run_comes_out_the_same(stop, whole, images, assets, tmp_path, monkeypatch):
    name = f"each_{stop}"
    complete = getattr(api.Model, name)

    def cut(self, *arguments, **keywords):
        for number, item in enumerate(complete(self, *arguments, **keywords)):
            if number == 3:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(api.Model, name, cut)
    with pytest.raises(SystemExit, match="interrupted"):
        bench(images, tmp_path, assets)
    monkeypatch.setattr(api.Model, name, complete)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(read_records(tmp_path / "captions.jsonl")) == (3 if stop == "caption" else 5) and len(kept) == (
        0 if stop == "caption" else 3
    )
    bench(images, tmp_path, assets)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert written(tmp_path) == written(whole)
    order = sorted(read_records(tmp_path / "captions.jsonl"), key=lambda record: record["image_id"])
    assert order == sorted(read_records(whole / "captions.jsonl"), key=lambda record: record["image_id"])


def test_other_settings_are_refused_and_images_of_one_stem_told(whole, images, assets, tmp_path):
    with pytest.raises(SystemExit, match="was begun with steps=2, now it is steps=3"):
        bench(images, whole, assets, "--steps=3")
    Image.open(images / "0.png").save(tmp_path / "0.png"), Image.open(images / "0.png").save(tmp_path / "0.webp")
    with pytest.raises(SystemExit, match="would both become 0.png"):
        bench(tmp_path, tmp_path / "out", assets)


def test_a_corrupt_original_is_told_and_the_others_are_scored(images, assets, tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(2):
        (tmp_path / "in" / f"{index}.png").write_bytes((images / f"{index}.png").read_bytes())
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(SystemExit, match="1 thing could not be scored: .*broken.png"):
        bench(tmp_path / "in", tmp_path / "out", assets)
    results = json.loads((tmp_path / "out" / "unified_bench.json").read_text())
    assert results["summary"]["n_valid"] == 2 and len(results["errors"]) == 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="none of the 1 images could be reconstructed"):
        bench(tmp_path / "bad", tmp_path / "other", assets)
