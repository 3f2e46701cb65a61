"""`evaluate decoder`: one program for all guidances, a guidance chosen on other texts, and pairs of the same ones."""

import argparse
import json

import numpy as np
import pytest
from stand_ins import refused

import uae_jax
from uae_jax import evaluate
from uae_jax.data.scene_captions import withheld
from uae_jax.evaluation import decoder
from uae_jax.training.summary import write_summary

FEW = ("--scenes=4", "--per_tag=1", "--scales", "1", "3")


@pytest.fixture(scope="module")
def model():
    return uae_jax.load("", steps=2, batch_size=4)


@pytest.fixture
def loaded(model, monkeypatch):
    monkeypatch.setattr(decoder, "load_model", lambda options: model)


def flags(*words):
    parser = argparse.ArgumentParser()
    decoder.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_one_program_draws_what_the_model_draws_at_each_guidance(model, monkeypatch):
    programs, make = [], decoder.guided_program

    def kept(*inputs):
        programs.append(make(*inputs))
        return programs[-1]

    monkeypatch.setattr(decoder, "guided_program", kept)
    texts = ["red circle", "gray background , top left large blue square", "two cross"]
    drawn = decoder.draw_all(model.engine, texts, (1.0, 3.0), 4)
    assert [program._cache_size() for program in programs] == [1] and drawn.shape == (2, 3, 32, 32, 3)
    guided = uae_jax.load("", steps=2, batch_size=4, guidance_scale=3.0)
    for pictures, one in zip(drawn, (model, guided)):
        expected = np.stack([np.asarray(picture) for picture in one.generate(texts)]).astype(int)
        assert np.abs(pictures - expected).max() <= 1  # of 255: another batch rounds otherwise
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 20


def test_a_unified_model_draws_each_text_at_each_guidance():
    one, texts = uae_jax.load("unified", batch_size=2), ["red circle", "blue square", "two green cross"]
    drawn = decoder.draw_all(one.engine, texts, (1.0, 3.0), 2)
    assert drawn.shape == (2, 3, 32, 32, 3) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[0], np.stack([np.asarray(image) for image in one.generate(texts)]))
    assert one.settings.guidance_scale == 1.0  # the other engine shares the weights, not the settings
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 20


def test_dev_and_test_share_no_text():
    dev, test = (decoder.make_split(name, flags("--scenes=50", "--per_tag=40")) for name in ("dev", "test"))
    assert (len(dev.scenes), len(test.scenes), len(dev.prompts), len(test.prompts)) == (25, 50, 120, 240)
    asked = [{prompt["prompt"] for prompt in split.prompts} for split in (dev, test)]
    assert not asked[0] & asked[1] and all(map(withheld, asked[1])) and not any(map(withheld, asked[0]))
    assert decoder.make_split("test", flags("--scene_seed=1")).digest != test.digest


def test_the_guidance_is_chosen_on_dev_texts(model, monkeypatch):
    """Where dev and test disagree, dev decides."""
    splits = {name: decoder.make_split(name, flags(*FEW)) for name in ("dev", "test")}
    good = {"dev": 3.0, "test": 1.0}

    def scores(split, drawn):
        name = next(name for name, known in splits.items() if known is split)
        right = float(drawn[0, 0, 0, 0] == good[name])
        counts = (len(split.scenes), len(split.prompts), len(split.prompts))
        return {key: np.full(n, right) for key, n in zip((decoder.SCENE_SCORE, *decoder.PROMPT_SCORES), counts)}

    def drawn(engine, texts, scales, batch):
        return np.stack([np.full((len(texts), 2, 2, 3), scale) for scale in scales])

    monkeypatch.setattr(decoder.Split, "scores", scores)
    monkeypatch.setattr(decoder, "draw_all", drawn)
    found = decoder.compare(model.engine, splits, [1.0, 3.0], 4)
    assert found["best"] == 3.0 and found["headline"]["geneval"]["value"] == 0.0
    assert found["scales"]["1"]["test"]["geneval"]["value"] == 1.0


def test_a_workdir_gets_the_scores_and_others_are_compared_text_by_text(loaded, tmp_path, capsys):
    start, workdir = tmp_path / "start.json", tmp_path / "run"
    evaluate.main(["decoder", *FEW, f"--output={start}"])
    first = json.loads(start.read_text())
    assert set(first["scales"]) == {"1", "3"} and len(first["values"]["geneval"]) == 6
    assert first["headline"]["geneval_color_attr"]["n"] == 1
    workdir.mkdir()
    write_summary(workdir, preset="tiny", seed=0, stages=[])
    capsys.readouterr()
    evaluate.main(["decoder", *FEW, f"--checkpoint={workdir}", f"--against={start}"])
    assert json.loads((workdir / "decoder.json").read_text())["values"] == first["values"]
    said = capsys.readouterr().out
    assert "+0.000 [+0.000, +0.000]" in said and "report.html" in said
    assert "The decoder at its best guidance" in (workdir / "report.html").read_text()
    split = decoder.make_split("test", flags(*FEW))
    other = json.loads(json.dumps(first))
    other["values"]["geneval"] = [1.0 - value for value in first["values"]["geneval"]]
    mean = np.mean(first["values"]["geneval"])
    assert decoder.paired(first, other, split)["geneval"]["value"] == pytest.approx(2 * mean - 1)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--scenes=4",), "give --output, a JSON file for the result"),
        (("--output=x.json", "--scales", "1", "1"), "give different numbers of 0 or more"),
        (("--output=x.json", "--against=none.json"), "none.json does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("decoder", *words)


def test_scores_of_other_texts_are_no_baseline(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"values": {}, "texts": "0", "best": 1.0, "headline": {}}))
    assert "has the scores of other texts" in refused("decoder", f"--output={tmp_path / 'x'}", f"--against={path}")
