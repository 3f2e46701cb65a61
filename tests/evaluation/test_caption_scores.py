"""What captions say: facts against the scenes, statistics against hand counts, CLIP similarity against transformers."""

import json
import string

import numpy as np
import pytest
import torch
import transformers
from bench_pieces import clip_encoder, clip_model, longclip_encoder, openai_state, photographs
from PIL import Image

from uae_jax import evaluate
from uae_jax.data.scene_captions import caption, random_detail_caption
from uae_jax.data.scene_checker import caption_score
from uae_jax.data.scenes import Scene, SceneObject, scene_at
from uae_jax.evaluation.caption_scores import (
    ATTRIBUTES,
    caption_facts,
    distinct,
    facts_summary,
    ratio_interval,
    repetition,
    text_statistics,
    words,
)
from uae_jax.files.json_files import read_records

SCENE = Scene("gray", (SceneObject(0, 0, "circle", "red", "large"), SceneObject(1, 1, "square", "blue", "small")))


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("gray background , top left large red circle , bottom right small blue square", {}),
        (
            "gray background , top left large red circle",
            {"shape": (1, 1, 2), "colour": (1, 1, 2), "size": (1, 1, 2), "position": (1, 1, 2), "count": (0, 1, 1)},
        ),
        (
            "black background , top left large red circle , bottom right small blue cross",
            {"background": (0, 1, 1), "shape": (1, 2, 2)},
        ),
        (
            "red circle and green square",
            {"colour": (1, 2, 2), "size": (0, 0, 2), "position": (0, 0, 2), "background": (0, 0, 1)},
        ),
        (
            "three object",
            {name: (0, 0, 2) for name in ("shape", "colour", "size", "position")}
            | {"background": (0, 0, 1), "count": (0, 0, 1)},
        ),
        (
            "two circle",
            {
                "shape": (1, 2, 2),
                **{name: (0, 0, 2) for name in ("colour", "size", "position")},
                "background": (0, 0, 1),
            },
        ),
        (
            "",
            {name: (0, 0, 2) for name in ("shape", "colour", "size", "position")}
            | {"background": (0, 0, 1), "count": (0, 0, 1)},
        ),
    ],
)
def test_facts_by_attribute(text, wrong):
    right = {name: (2, 2, 2) for name in ("shape", "colour", "size", "position")} | {
        "background": (1, 1, 1),
        "count": (1, 1, 1),
    }
    assert caption_facts(SCENE, text) == right | wrong


def test_attributes_add_up_to_the_whole_score():
    rng = np.random.default_rng(0)
    for index in range(60):
        scene, other = scene_at("test", index), scene_at("test", index + 1)
        for text in (
            caption(scene),
            random_detail_caption(scene, rng, 0.1, 0.9),
            caption(other),
            "red , red red blue , nonsense",
        ):
            counts, score = caption_facts(scene, text), caption_score(scene, text)
            correct, claimed, total = (sum(counts[name][i] for name in ATTRIBUTES if name != "count") for i in range(3))
            assert (correct, total) == (score.recalled, score.total)
            assert claimed <= score.claimed  # which has relations and unparsed words too


def test_summary_of_perfect_and_of_foreign_captions():
    scenes = [scene_at("test", index) for index in range(30)]
    perfect = facts_summary(scenes, [caption(scene) for scene in scenes])
    assert perfect["fact_recall"]["value"] == perfect["fact_precision"]["value"] == 1 and perfect["unparsed_words"] == 0
    assert all(
        entry[kind]["value"] == 1 for entry in perfect["attributes"].values() for kind in ("recall", "precision")
    )
    foreign = facts_summary(scenes, [caption(scene) for scene in scenes[1:]] + ["what is this"])
    assert 0.1 < foreign["attributes"]["colour"]["recall"]["value"] < 0.6 and foreign[
        "unparsed_words"
    ] == pytest.approx(1 / 30)
    with pytest.raises(ValueError):
        facts_summary(scenes, ["one"])


def test_ratio_interval_covers_and_is_none_without_claims():
    rng = np.random.default_rng(0)
    claimed = rng.integers(0, 5, 400)
    found = ratio_interval(rng.binomial(claimed, 0.7), claimed)
    assert found is not None
    assert (
        found["low"] < found["value"] < found["high"]
        and found["low"] < 0.7 < found["high"]
        and found["high"] - found["low"] < 0.1
    )
    assert ratio_interval([0, 0], [0, 0]) is None


def test_text_statistics():
    assert words("A cat's well-worn, RED hat. \u00c9t\u00e9!") == [
        "a",
        "cat's",
        "well-worn",
        "red",
        "hat",
        "\u00e9t\u00e9",
    ]
    assert distinct([["a", "b"], ["a", "b", "c"]], 1) == 3 / 5 and distinct([["a", "b"], ["a", "b", "c"]], 2) == 2 / 3
    assert repetition("a b c d a b c d".split()) == pytest.approx(1 / 5) and repetition("a b c".split()) == 0
    found = text_statistics(["one two three", "one two three", "four"])
    assert (found["words"]["value"], found["words"]["shortest"], found["words"]["longest"]) == (
        pytest.approx(7 / 3),
        1,
        3,
    )
    assert found["different_captions"] == pytest.approx(2 / 3) and found["distinct_3"] == 0.5


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP folder with a tokenizer of letters; its text model has 30 positions and 60 tokens."""
    folder = tmp_path_factory.mktemp("clip")
    clip_encoder(folder)
    letters = [*string.ascii_lowercase, ",", ".", "'"]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    transformers.CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = ["a cat", "a cup of coffee.", "an astronaut, smiling, with a flag that is far too long for the model"]
    with (folder / "captions.jsonl").open("w") as file:
        for (name, photo), text in zip(photographs().items(), texts):
            photo.save(folder / f"{name}.png")
            file.write(json.dumps({"file_name": f"{name}.png", "caption": text}) + "\n")
    return folder, texts


def run(output, **flags):
    evaluate.main(["captions", f"--output={output}", *(f"--{name}={value}" for name, value in flags.items())])
    return json.loads(output.read_text())


def expected(model, encoder, data, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cosines = {}
    for record, text in zip(read_records(data[0] / "captions.jsonl"), data[1]):
        ids = tokenizer(text, truncation=True, max_length=30, return_tensors="pt")["input_ids"]
        image = encoder.feature(encoder.pixels(Image.open(data[0] / record["file_name"]).convert("RGB")))
        with torch.no_grad():
            said = model.get_text_features(input_ids=ids).pooler_output
        cosines[record["file_name"]] = float(torch.cosine_similarity(torch.tensor(image), said))
    return cosines


def test_clip_similarity_is_that_of_transformers(clip_folder, data, tmp_path, capsys):
    found = run(tmp_path / "out.json", data=data[0], clip=clip_folder, encoder_batch_size=2)
    theirs = expected(clip_model(), clip_encoder(clip_folder), data, clip_folder)
    assert np.ptp(list(theirs.values())) > 0.02
    assert found["clip"]["scores"] == pytest.approx(theirs, abs=1e-4)
    assert found["clip"]["cosine"]["value"] == pytest.approx(np.mean(list(theirs.values())), abs=1e-4)
    assert found["clip"]["clip_score"]["value"] == pytest.approx(
        2.5 * np.mean([max(v, 0) for v in theirs.values()]), abs=1e-3
    )
    assert (found["clip"]["captions_cut"], found["clip"]["tokens"], found["clip"]["n_valid"], found["errors"]) == (
        1,
        30,
        3,
        [],
    )
    assert "clip cosine" in capsys.readouterr().out


def test_long_clip_takes_its_own_positions(clip_folder, data, tmp_path):
    published = longclip_encoder(tmp_path)
    model, state = clip_model(), torch.load(published.path)
    assert set(state) == set(openai_state(model))
    table = model.text_model.embeddings.position_embedding.weight
    with torch.no_grad():
        table[20:] = state["positional_embedding_res"][20:]
    found = run(tmp_path / "out.json", data=data[0], clip=clip_folder, longclip=published.path)
    assert found["clip"]["model"] == "longclip"
    assert found["clip"]["scores"] == pytest.approx(expected(model, published, data, clip_folder), abs=1e-4)


def test_a_corrupt_image_is_told_and_the_rest_is_kept(clip_folder, data, tmp_path):
    for file in data[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:2000] if file.name == "coffee.png" else file.read_bytes())
    with pytest.raises(SystemExit, match="^error: 1 images could not be scored, the first: .*coffee.png"):
        run(tmp_path / "out.json", data=tmp_path, clip=clip_folder)
    found = json.loads((tmp_path / "out.json").read_text())["clip"]
    assert found["n_valid"] == 2 and found["scores"]["coffee.png"] is None and found["cosine"]["n"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(), "give --scenes, or --data"),
        (dict(data="x", scenes=3), "give --scenes, or --data"),
        (dict(scenes=3), "--scenes needs --out"),
        (dict(data="nowhere"), "captions.jsonl does not exist"),
        (dict(captions="{data}/captions.jsonl", clip="{clip}"), "give --images"),
        (dict(data="{data}", longclip="x"), "--longclip needs --clip"),
        (dict(data="{data}", clip="{data}"), "has no tokenizer"),
    ],
)
def test_bad_input_is_one_line(flags, message, clip_folder, data, tmp_path):
    flags = {name: str(value).format(data=data[0], clip=clip_folder) for name, value in flags.items()}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(tmp_path / "out.json", **flags)


def test_the_built_in_model_is_asked_about_scenes_once(tmp_path, monkeypatch):
    from uae_jax import api

    flags = dict(scenes=4, out=tmp_path / "said", temperature=0)
    first = run(tmp_path / "first.json", **flags)
    assert first["facts"]["fact_recall"]["n"] == 4 and set(first["facts"]["attributes"]) == set(ATTRIBUTES)
    assert first["captions"] == {
        record["image_id"]: record["caption"] for record in read_records(tmp_path / "said" / "captions.jsonl")
    }
    monkeypatch.setattr(
        api.Model,
        "each_caption",
        lambda self, images, **keywords: iter(()) if not images else pytest.fail("asked again"),
    )
    assert run(tmp_path / "again.json", **flags) == first
