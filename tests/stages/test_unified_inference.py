"""A Janus folder behind the commands that UAE has: captions, drawings, reconstructions."""

import json

import janus_pieces as pieces
import numpy as np
import pytest
import torch
from PIL import Image

import uae_jax
from uae_jax import infer
from uae_jax.data.janus_inputs import padded_square
from uae_jax.stages.unified_inference import UnifiedInference


@pytest.fixture(scope="module")
def theirs():
    return pieces.build(vocabulary=pieces.WORDS)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    place = tmp_path_factory.mktemp("janus")
    theirs.save_pretrained(place)
    pieces.write_tokenizer(place, pieces.WORDS)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return uae_jax.load(folder, max_new_tokens=10, batch_size=2, guidance_scale=2.0, temperature=0.0)


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    return [Image.fromarray(image).resize(size) for image, size in zip(noise, ((50, 40), (32, 32), (20, 64)))]


def test_the_folder_is_known_and_has_the_official_settings(folder, model):
    assert UnifiedInference.knows(str(folder)) and not UnifiedInference.knows("")
    assert isinstance(model.engine, UnifiedInference)
    assert (model.settings.size, model.settings.temperature) == (32, 0.0)
    assert "helpful language and vision assistant" in model.settings.system_prompt


def test_greedy_captions_equal_transformers(theirs, model):
    captions = model.caption(pictures())
    engine = model.engine
    ids = engine.tokenizer.question_ids(model.settings.prompt, model.settings.system_prompt)
    for image, caption in zip(pictures(), captions):
        inputs = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        inputs["pixel_values"] = pieces.for_torch(padded_square(image, 32)[None])
        with torch.no_grad():
            said = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)[0, len(ids) :]
        assert caption == engine.tokenizer.decode_caption(said)
    assert len(set(captions)) > 1


def test_drawings_follow_text_and_number_and_not_their_batch(model):
    texts = ["a red cat", "a blue dog in the picture , what is red", "a red cat"]
    first, other, second = model.generate(texts)
    assert first.size == (32, 32) and first.tobytes() != second.tobytes()  # another number
    assert second.tobytes() == model.generate(texts[:1], sample_ids=[2])[0].tobytes()
    assert other.tobytes() == model.generate(texts[1:2], sample_ids=[1])[0].tobytes()


@pytest.mark.trap(53)
def test_a_reconstruction_is_the_drawing_of_its_caption(model):
    found = model.reconstruct(pictures()[:2])
    assert [result.caption for result in found] == model.caption(pictures()[:2])
    for number, result in enumerate(found):
        drawn = model.generate([result.caption], sample_ids=[number])[0]
        assert drawn.tobytes() == result.image.tobytes()


def test_the_command_writes_what_it_draws(folder, tmp_path, capsys):
    picture = tmp_path / "a.png"
    pictures()[0].save(picture)
    common = ["--checkpoint", str(folder), "--max_new_tokens", "10", "--json", "--out", str(tmp_path / "out")]
    for command, given in (("caption", str(picture)), ("generate", "a red cat"), ("reconstruct", str(picture))):
        infer.main([command, given, *common])
        record = json.loads(capsys.readouterr().out)
        assert record.get("caption", "a red cat") is not None
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"0000.png", "a.png", "a_strip.png"}


def test_what_the_model_cannot_do_is_said(folder, model, tmp_path):
    with pytest.raises(ValueError, match="draws 32 pixels alone"):
        uae_jax.load(folder, size=64)
    with pytest.raises(ValueError, match="tokens of at most 8,192"):
        model.generate(["a red cat " * 3000])
    with pytest.raises(ValueError, match="questions about one image, not 2"):
        model.engine.question_fields("which?", pictures()[:2])
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        uae_jax.load(tmp_path)
    pieces.write_tokenizer(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    stored["text_config"]["vocab_size"] = 160
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="tokens in tokenizer.json and 160 in"):
        uae_jax.load(tmp_path)
