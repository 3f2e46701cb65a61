"""Decoders with a text encoder of their own in the commands that use and measure a model, and what these refuse."""

import json
import shutil

import numpy as np
import pytest
from imported_decoders import DROPPED, imported
from PIL import Image
from stage_pieces import changed, exit_of

import uae_jax
from uae_jax import api, demo, evaluate, infer
from uae_jax.data.scenes import draw, scene_at
from uae_jax.evaluation import decoder as decoder_bench
from uae_jax.evaluation.similarities import Similarities
from uae_jax.models.qwen_image import decoder as qwen_image
from uae_jax.planning.plan import make_plan
from uae_jax.settings import Mistakes
from uae_jax.stages import decoders
from uae_jax.stages.checks import check_run

pytestmark = pytest.mark.usefixtures("all_on_one_device")

SIDE = 32
FLAGS = {"size": SIDE, "steps": 2, "max_new_tokens": 8, "batch_size": 2}


@pytest.fixture(
    scope="module",
    params=["z_image", *(pytest.param(name, marks=pytest.mark.slow) for name in ("klein_base", "qwen_image"))],
)
def opened(request, model_folder, tmp_path_factory):
    """A model with each kind of decoder: its folder, and what `load` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen_image, "DROPPED", DROPPED)
        folder = imported(request.param, model_folder, tmp_path_factory.mktemp(request.param))
        yield folder, uae_jax.load(folder, guidance_scale=3.0, **FLAGS)


@pytest.fixture(scope="module")
def klein(model_folder, tmp_path_factory):
    """The folder of a model whose decoder is distilled, so that it has no guidance."""
    return imported("klein", model_folder, tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="module")
def distilled(klein):
    return uae_jax.load(klein, **FLAGS)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        Image.fromarray(draw(scene_at("test", index))).save(folder / f"{index}.png")
    return folder


def flags(**more):
    return [f"--{name}={value}" for name, value in (FLAGS | more).items()]


def test_the_page_captions_draws_and_compares(opened, images):
    _, model = opened
    page, picture = demo.Page(model, Similarities(model)), Image.open(images / "0.png")
    text, drawn, rows = page.reconstruct(picture, 3)
    [result] = model.reconstruct([picture], sample_ids=[3])
    assert (text, drawn.tobytes()) == (result.caption, result.image.tobytes())
    assert drawn.size == (SIDE, SIDE) and [name for name, _ in rows] == ["clip", "dinov2"]
    assert page.draw(picture, "large red circle", 3)[0].tobytes() != drawn.tobytes()
    names = {function.api_name for function in demo.build(page, "tiny").fns.values()}
    assert {"caption", "draw", "reconstruct"} <= names and "before" not in names


def test_the_benches_caption_and_draw(opened, images, tmp_path, monkeypatch):
    folder, model = opened
    monkeypatch.setattr(api, "load", lambda *_, **__: model)
    bench = ["unified_bench", f"--images={images}", f"--checkpoint={folder}", f"--out={tmp_path / 'bench'}"]
    for _ in range(2):  # the second time, nothing is left to draw
        evaluate.main([*bench, f"--clip={folder / 'clip'}", f"--dinov2={folder / 'dinov2'}"])
    found = json.loads((tmp_path / "bench" / "unified_bench.json").read_text())
    assert found["errors"] == [] and found["summary"]["n_valid"] == 3
    out = tmp_path / "geneval"
    evaluate.main(["geneval", "write", "--prompts=scenes", "--per_tag=1", f"--out={out}", f"--checkpoint={folder}"])
    evaluate.main(["geneval", "score", str(out)])
    assert len((tmp_path / "geneval.results.jsonl").read_text().splitlines()) == 24


def test_one_program_draws_at_every_guidance(opened):
    """Qwen-Image's guidance is not linear, and its scale may be one of each row too."""
    _, model = opened
    texts = ["red circle", "large blue square"]
    drawn = decoder_bench.draw_all(model.engine, texts, (1.0, 3.0), 2)
    expected = np.stack([np.asarray(image) for image in model.generate(texts)]).astype(int)
    assert np.abs(drawn[1] - expected).max() <= 1  # of 255: another program rounds otherwise
    assert np.abs(drawn[0] - expected).max() > 1


def test_a_distilled_decoder_is_scored_without_guidance(distilled):
    assert distilled.settings.guidance_scale == 1.0
    [drawn] = decoder_bench.draw_all(distilled.engine, ["red circle"], (1.0,), 2)
    expected = np.asarray(distilled.generate(["red circle"])[0]).astype(int)
    assert np.abs(drawn[0] - expected).max() <= 1  # of 255
    with pytest.raises(ValueError, match="--scales: guidance_scale is 2, but this FLUX.2-klein is distilled"):
        decoder_bench.draw_all(distilled.engine, ["red circle"], (1.0, 2.0), 2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(guidance_scale=5), "distilled and needs no guidance"),
        (dict(condition="policy"), "has a text encoder of its own; use reference"),
        (dict(size=30), "generates multiples of 4, such as 32"),
    ],
)
def test_a_folder_is_not_begun_with_settings_that_cannot_draw(klein, images, tmp_path, wrong, message):
    """The right settings would be refused there as other ones."""
    out = [f"--out={tmp_path / 'out'}", f"--checkpoint={klein}", *flags(**wrong)]
    for words in (["unified_bench", f"--images={images}", f"--clip={klein / 'clip'}"], ["geneval", "write"]):
        more = ["--prompts=scenes", "--per_tag=1"] if "write" in words else []
        assert message in str(exit_of(evaluate.main, *words, *more, *out))
        assert not [path for path in tmp_path.iterdir() if path != images]


def test_an_empty_caption_is_drawn_on_the_page(distilled, images, monkeypatch):
    monkeypatch.setattr(distilled, "caption", lambda images, sample_ids: [""] * len(images))
    text, drawn, _ = demo.Page(distilled, lambda *_: {}).reconstruct(Image.open(images / "0.png"), 0)
    assert text == "" and drawn.tobytes() == distilled.generate([""])[0].tobytes()


@pytest.mark.parametrize("place", ["pipeline", "model/decoder"])
def test_a_pipeline_alone_is_no_model(klein, place):
    folder = klein.parent / place
    said = str(exit_of(infer.main, "generate", "red circle", f"--checkpoint={folder}"))
    assert f"{folder} holds a decoder alone; put it beside a captioner" in said and f"--decoder={folder}" in said


def test_a_text_encoder_of_another_model_is_named(klein, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(klein, broken)
    config = broken / "decoder" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3, "layer_types": None}))
    said = str(exit_of(infer.main, "generate", "red circle", f"--checkpoint={broken}"))
    assert f"{config.parent} has 3 layers, and klein reads the states after (9, 18, 27)" in said


def values_of(config, folder, **sections):
    values = changed(config, stages=("gen_for_und",), data=dict(negative_prompt=""), sampler=dict(schedule="diffusers"))
    values = changed(values, gen_for_und=dict(guidance_scale=1.0), evaluation=dict(guidance_scale=1.0))
    return changed(values, model=dict(folder=str(folder)), **sections)


def test_what_cannot_be_drawn_is_told_before_a_run_begins(config, klein, tmp_path):
    wrong = dict(evaluation=dict(guidance_scale=5.0, also_guidance_scale=3.0), data=dict(image_size=18))
    values = values_of(config, klein, **wrong)
    lines = [
        "config.data.image_size: size is 18 pixels; this model generates multiples of 4, such as 16",
        *(
            f"config.evaluation.{name}: guidance_scale is {scale}, but this FLUX.2-klein is distilled and needs no "
            "guidance; set it to 1"
            for name, scale in (("guidance_scale", 5), ("also_guidance_scale", 3))
        ),
    ]
    for refused in (lambda: check_run(values, tmp_path / "run"), lambda: make_plan(values, "gpu:1xH100")):
        with pytest.raises(Mistakes) as told:
            refused()
        assert told.value.lines == lines


def test_an_image_is_a_whole_number_of_cells(config, opened, tmp_path):
    """Qwen-Image has patches of several latents, which failed in the step; klein and SD3 drew smaller images."""
    folder, model = opened
    cell = model.engine.system.model.decoder.cell
    for place, size, near in ((folder, 5 * cell // 2, 2 * cell), (config["model"]["folder"], 18, 16)):
        values = values_of(config, place, data=dict(image_size=size))
        with pytest.raises(Mistakes, match=f"size is {size} pixels; .* such as {near}"):
            check_run(values, tmp_path / "run")


def test_a_mistake_of_the_folder_is_one_line(config, klein, tmp_path):
    values = values_of(config, klein / decoders.FOLDER)
    with pytest.raises(Mistakes) as told:
        check_run(values, tmp_path / "run", thorough=True)
    assert len(told.value.lines) == 1 and "holds a decoder alone" in told.value.lines[0]
