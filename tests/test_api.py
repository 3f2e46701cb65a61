"""The Python API on the built-in model: lists in the order given, results that follow from input and number alone."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import uae_jax
from uae_jax import api
from uae_jax.data import scenes
from uae_jax.settings import as_dict
from uae_jax.stages.bootstrap.settings import BootstrapConfig
from uae_jax.stages.run_config import CAPTION_PROMPT, NEGATIVE_PROMPT
from uae_jax.stages.weights import BUILTIN, DEFAULT, NAMED, model_folder


@pytest.fixture(scope="module")
def model():
    return uae_jax.load(steps=2, batch_size=2, max_new_tokens=12)


@pytest.fixture(scope="module")
def pictures():
    """Three scenes; the second is of another shape, so that the third overtakes it."""
    drawn = [scenes.draw(scenes.scene_at("test", index)) for index in range(3)]
    return [drawn[0], drawn[1][:16], drawn[2]]


def test_built_in_models_have_names_and_the_start_model_says_what_it_is(tmp_path, monkeypatch):
    start = uae_jax.load("start", steps=2)
    assert start.engine.folder == BUILTIN == model_folder("") == model_folder("start")
    assert "not trained yet" in start.warning and start.settings.size == 32
    assert uae_jax.load(steps=2).engine.folder == NAMED[DEFAULT]
    assert (DEFAULT == "trained") == NAMED["trained"].is_dir(), "a trained model in the package is the default"
    monkeypatch.chdir(tmp_path)  # a folder of that name comes first
    (tmp_path / "start" / "llm").mkdir(parents=True)
    assert model_folder("start").resolve() == tmp_path / "start"


def test_captions_come_back_in_order_for_paths_images_and_arrays(model, pictures, tmp_path):
    captions = model.caption(pictures)
    assert len(captions) == 3 and all(isinstance(caption, str) for caption in captions)
    files = [tmp_path / f"{index}.png" for index in range(3)]
    for file, picture in zip(files, pictures):
        Image.fromarray(picture).save(file)
    assert model.caption([str(files[0]), files[1], Image.fromarray(pictures[2])]) == captions
    assert [index for index, _ in model.each_caption(pictures)] == [0, 2, 1]
    assert dict(model.each_caption(pictures)) == dict(enumerate(captions))


def test_a_part_of_the_work_done_later_comes_out_the_same(model, pictures):
    whole = model.reconstruct(pictures)
    later = model.reconstruct(pictures[2:], sample_ids=[2])
    assert later[0].caption == whole[2].caption
    np.testing.assert_array_equal(later[0].image, whole[2].image)
    np.testing.assert_array_equal(whole[1].original, pictures[1])


def test_drawings_follow_text_and_number(model):
    texts = ["large red circle"] * 3
    first, second, again = model.generate(texts, sample_ids=[5, 6, 5])
    assert first.size == (32, 32) and first.tobytes() == again.tobytes() != second.tobytes()
    default = model.generate(texts[:2])
    assert default[1].tobytes() == model.generate(texts[:1], sample_ids=[1])[0].tobytes()


def test_a_reconstruction_is_the_drawing_of_its_caption(model, pictures):
    result = model.reconstruct(pictures[:1], sample_ids=[3])[0]
    assert result.caption == model.caption(pictures[:1], sample_ids=[3])[0]
    np.testing.assert_array_equal(result.image, model.generate([result.caption], sample_ids=[3])[0])


def test_a_bad_picture_is_named_and_the_others_are_done(model, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    strip = tmp_path / "strip.png"
    Image.new("RGB", (401, 2)).save(strip)
    inputs = [pictures[0], broken, strip, tmp_path / "missing.png", pictures[2]]
    failed = {}
    done = dict(model.each_reconstruction(inputs, failed=lambda index, error: failed.update({index: str(error)})))
    assert sorted(done) == [0, 4] and sorted(failed) == [1, 2, 3]
    assert "broken.png is not a readable image" in failed[1] and "missing.png does not exist" in failed[3]
    assert failed[2].startswith(f"{strip}: ") and "aspect ratio" in failed[2]
    alone = model.reconstruct([pictures[2]], sample_ids=[4])[0]
    assert done[4].caption == alone.caption and done[4].image.tobytes() == alone.image.tobytes()
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        model.caption(inputs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.caption("a.png"), "give a list"),
        (lambda model: model.generate("red circle"), "give a list"),
        (lambda model: model.reconstruct(np.zeros((32, 32, 3), np.uint8)), "give a list"),
        (lambda model: model.generate(["red", "blue"], sample_ids=[1]), "1 sample_ids for 2 inputs"),
        (lambda model: model.generate(["red"], sample_ids=[-1]), r"sample_ids\[0\] is -1"),
        (lambda model: model.generate(["red " * 13]), "longer than 12 tokens"),
        (lambda model: model.caption([np.zeros((8, 8, 3))]), "must be uint8"),
    ],
)
def test_wrong_inputs_are_one_sentence(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(stepz=3), "settings.stepz does not exist; did you mean settings.steps"),
        (dict(steps=0), "steps is 0"),
        (dict(steps="3"), "settings.steps"),
        (dict(size=33), "multiples of 8 up to 64, such as 32"),
        (dict(top_p=0.0), "top_p"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        uae_jax.load(**settings)


def test_settings_suit_the_folder(tmp_path):
    assert api.default_settings()["size"] == 32
    official = tmp_path / "official"
    (official / "llm").mkdir(parents=True)
    assert api.default_settings(official) == dict(
        prompt=CAPTION_PROMPT, negative_prompt=NEGATIVE_PROMPT, condition="reference"
    )
    run = dict(
        stages=["gen_for_und"],
        gen_for_und=dict(condition_model="policy"),
        und_for_gen=dict(condition_model="reference"),
        data=dict(image_size=48, max_caption=20, caption_prompt="say", caption_system="be brief", negative_prompt="no"),
        evaluation=dict(sampler_steps=7, guidance_scale=2.0, batch_size=64),
        sampler=dict(shift=2.0, schedule="single"),
    )
    (tmp_path / "run" / "export" / "llm").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    expected = dict(
        size=48,
        steps=7,
        guidance_scale=2.0,
        shift=2.0,
        schedule="single",
        max_new_tokens=20,
        prompt="say",
        system_prompt="be brief",
        negative_prompt="no",
        control_tokens=False,
        batch_size=8,
        condition="policy",
    )
    assert api.default_settings(tmp_path / "run") == expected == api.default_settings(tmp_path / "run" / "export")
    made = tmp_path / "bootstrap" / "model"
    (made / "llm").mkdir(parents=True)
    (made.parent / "config.json").write_text(json.dumps(as_dict(BootstrapConfig(side=64))))
    assert api.default_settings(made) == api.default_settings() | {"size": 64}
    assert api.default_settings(made.parent) == api.default_settings(made)
    shutil.copy(BUILTIN / "dit" / "config.json", official / "config.json")  # of a single model
    assert api.default_settings(official)["prompt"] == CAPTION_PROMPT


def test_a_strip_shows_original_caption_and_drawing(pictures):
    drawn = Image.new("RGB", (32, 32), "red")
    strip, without = (
        np.asarray(api.Reconstruction(Image.fromarray(pictures[0]), said, drawn).strip(side=128))
        for said in ("large red circle " * 9, "")
    )
    assert strip.shape == (128 + 2 * 4, 3 * 128 + 4 * 4, 3)
    enlarged = np.asarray(Image.fromarray(pictures[0]).resize((128, 128), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(strip[4:132, 4:132], enlarged)
    assert (strip[4:132, 268:396] == (255, 0, 0)).all() and (without[:, 136:264] == 255).all()
    letters = np.argwhere((strip != without).any(-1))
    assert (
        letters[:, 1].min() >= 136 and letters[:, 1].max() < 264 and letters[:, 0].max() > 50
    )  # inside their square, in several lines
