"""Unified-Bench, protocol 1, against PyTorch's processors and models on photographs, and everything that can go
wrong.
"""

import json
import re

import numpy as np
import pytest
from bench_pieces import ENCODERS, longclip_encoder, photographs, reconstructions
from PIL import Image

from uae_jax import evaluate
from uae_jax.evaluation import encoders as module
from uae_jax.evaluation.encoders import open_bench_encoder
from uae_jax.evaluation.scores import results_json

OFFICIAL_KEYS = {"model_types", "similarities_by_model", "statistics_by_model", "summary"}
OFFICIAL_STATISTICS = {"total_images", "valid_pairs", "average_similarity", "min_similarity", "max_similarity"}
OFFICIAL_SUMMARY = {"models_used", "average_scores_by_model", "overall_average", "best_model", "worst_model"}


@pytest.fixture(scope="module")
def photos():
    return photographs()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in ENCODERS.items()}


@pytest.fixture(scope="module")
def folders(photos, tmp_path_factory):
    """References and images that each of the matching rules is needed for."""
    root = tmp_path_factory.mktemp("pictures")
    drawn = reconstructions(photos)
    (root / "gen" / "more").mkdir(parents=True), (root / "ref" / "deep").mkdir(parents=True)
    names = {
        "astronaut": ("astronaut.png", "astronaut.png"),
        "coffee": ("coffee.jpg", "coffee.png"),
        "cat": ("deep/cat.webp", "recon_cat.png"),
        "rocket": ("rocket.bmp", "more/rocket.webp"),
        "officer": ("officer.jpeg", "recon_officer.jpg"),
        "sliver": ("sliver.tiff", "sliver.PNG"),
    }
    pairs = {}
    for name, (reference, picture) in names.items():
        photos[name].save(root / "ref" / reference)
        drawn[name].save(root / "gen" / picture)
        pairs[picture.split("/")[-1]] = (root / "gen" / picture, root / "ref" / reference)
    return root, pairs


def bench(root, output, **flags):
    values = dict(ref_dir=root / "ref", gen_dir=root / "gen", output=output, encoder_batch_size=4) | flags
    evaluate.main(["unified_bench", *(f"--{name}={value}" for name, value in values.items() if value is not None)])


@pytest.mark.parametrize("name", ENCODERS)
def test_image_processing_is_the_published_one_on_photographs(name, encoders, photos):
    encoder = open_bench_encoder(name, encoders[name].path)
    for image in (*photos.values(), *reconstructions(photos).values()):
        ours, theirs = encoder.pixels(image), encoders[name].pixels(image)
        assert ours.dtype == np.float32 and ours.shape == theirs.shape == (224, 224, 3)
        np.testing.assert_allclose(ours, theirs, atol=2e-6 if name != "dinov3" else 2e-4)  # torch weighs in float32


def test_scores_are_those_of_pytorch_with_the_official_keys(encoders, folders, tmp_path, capsys):
    root, pairs = folders
    output = tmp_path / "made" / "scores.json"
    bench(root, output, **{name: encoder.path for name, encoder in encoders.items()})
    results = json.loads(output.read_text())
    assert OFFICIAL_KEYS <= set(results) and results["model_types"] == list(ENCODERS) and results["errors"] == []
    for name, encoder in encoders.items():
        scores, entry = results["similarities_by_model"][name], results["statistics_by_model"][name]
        assert set(scores) == set(pairs)
        theirs = {
            key: encoder.cosine(*(Image.open(file).convert("RGB") for file in files)) for key, files in pairs.items()
        }
        assert np.ptp(list(theirs.values())) > 0.02  # the random encoders distinguish these images
        gap = max(abs(scores[key] - value) for key, value in theirs.items())
        print(f"{name}: largest difference of a cosine {gap:.2e}")
        assert gap < 1e-4
        assert (
            OFFICIAL_STATISTICS <= set(entry) and entry["valid_pairs"] == entry["n_valid"] == entry["total_images"] == 6
        )
        assert entry["average_similarity"] == pytest.approx(np.mean(list(theirs.values())), abs=1e-4)
        assert entry["interval_95"][0] < entry["average_similarity"] < entry["interval_95"][1]
    summary = results["summary"]
    means = [results["statistics_by_model"][name]["average_similarity"] for name in ENCODERS]
    assert OFFICIAL_SUMMARY <= set(summary) and summary["overall_average"] == pytest.approx(np.mean(means))
    assert summary["best_model"] == [list(ENCODERS)[int(np.argmax(means))], max(means)]
    assert "of 6 images" in capsys.readouterr().out
    check_page((output.parent / "report.html").read_text(), results)


def check_page(page, results):
    """Every pair is there, worst first, and nothing is loaded from elsewhere."""
    shown = re.findall(r"<figcaption>([^<]+\.\w+)</figcaption>", page)
    scores = list(results["similarities_by_model"].values())
    assert shown == sorted(scores[0], key=lambda name: np.mean([model[name] for model in scores]))
    assert page.count("<img") == 12 and page.count('src="data:image/') == 12 and "http" not in page


def test_long_clip_in_safetensors_and_the_whole_batch_padded(folders, encoders, tmp_path):
    root, _ = folders
    other = longclip_encoder(tmp_path, "long.safetensors")
    bench(root, tmp_path / "a.json", longclip=other.path, encoder_batch_size=16)
    bench(root, tmp_path / "b.json", longclip=encoders["longclip"].path, encoder_batch_size=1)
    a, b = (
        json.loads((tmp_path / name).read_text())["similarities_by_model"]["longclip"] for name in ("a.json", "b.json")
    )
    assert a == pytest.approx(b, abs=1e-5)


def test_pictures_that_cannot_be_scored_are_told_and_the_rest_is_kept(photos, encoders, tmp_path, capsys):
    (tmp_path / "ref").mkdir(), (tmp_path / "gen").mkdir()
    for name in ("cat", "coffee", "rocket"):
        photos[name].save(tmp_path / "ref" / f"{name}.png")
        photos[name].save(tmp_path / "gen" / f"{name}.png")
    photos["officer"].save(tmp_path / "gen" / "stranger.png")
    photos["officer"].save(tmp_path / "ref" / "forgotten.png")
    (tmp_path / "gen" / "rocket.png").write_bytes((tmp_path / "gen" / "rocket.png").read_bytes()[:3000])
    photos["officer"].save(tmp_path / "gen" / "animation.gif")
    with pytest.raises(
        SystemExit, match="3 things could not be scored.*stranger.png.*forgotten.png.*rocket.png.*scores.json"
    ) as end:
        bench(tmp_path, tmp_path / "scores.json", clip=encoders["clip"].path, dinov3=encoders["dinov3"].path)
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    results = json.loads((tmp_path / "scores.json").read_text())
    for name in ("clip", "dinov3"):
        scores = results["similarities_by_model"][name]
        assert scores == {
            "cat.png": pytest.approx(1, abs=1e-6),
            "coffee.png": pytest.approx(1, abs=1e-6),
            "rocket.png": None,
            "stranger.png": None,
        }
        assert (
            results["statistics_by_model"][name]["n_valid"] == 2
            and results["statistics_by_model"][name]["total_images"] == 4
        )
    assert [error["error"].split(" (")[0].removeprefix(str(tmp_path)) for error in results["errors"]] == [
        "no reference has its name",
        "no image is compared with it",
        "/gen/rocket.png is not a readable image",
    ]
    assert "animation.gif is not read" in results["warnings"][0]
    assert "Missing from these scores: 3" in (tmp_path / "report.html").read_text()


def test_an_encoder_that_cannot_be_read_does_not_cost_the_others(encoders, folders, tmp_path):
    broken = tmp_path / "clip"
    broken.mkdir()
    for file in encoders["clip"].path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="1 thing could not be scored: clip: "):
        bench(folders[0], tmp_path / "scores.json", clip=broken, dinov2=encoders["dinov2"].path)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert results["summary"]["models_used"] == ["dinov2"] and results["statistics_by_model"]["dinov2"]["n_valid"] == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(), "no encoder is given"),
        (dict(clip="{clip}", gen_dir=None), "give --ref_dir and --gen_dir"),
        (dict(clip="{clip}", images="a", out="b"), "give --ref_dir and --gen_dir"),
        (dict(clip="{clip}", output=None), "--output is not given"),
        (dict(clip="{clip}", encoder_batch_size=0), "--encoder_batch_size is 0; it must be at least 1"),
        (dict(clip="{root}/nothing"), "image encoder not found: .*nothing"),
        (dict(clip="{dinov2}"), "holds a dinov2 model; give the folder of clip"),
        (dict(dinov3="{dinov2}"), "holds a dinov2 model; give the folder of dinov3"),
        (dict(clip="{clip}", gen_dir="{root}/empty"), "empty holds no images"),
        (dict(clip="{clip}", ref_dir="{root}/absent"), "absent does not exist"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, encoders, folders, tmp_path):
    (tmp_path / "empty").mkdir()
    paths = {name: encoder.path for name, encoder in encoders.items()}
    flags = {
        name: value.format(root=tmp_path, **paths) if isinstance(value, str) else value for name, value in flags.items()
    }
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        bench(folders[0], **{"output": tmp_path / "scores.json"} | flags)
    assert not (tmp_path / "scores.json").exists()


def test_interrupted_scoring_keeps_what_was_done(encoders, folders, tmp_path, monkeypatch):
    calls, whole = [], module.image_features

    def features(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(module, "image_features", features)
    with pytest.raises(SystemExit, match="interrupted"):
        bench(folders[0], tmp_path / "scores.json", clip=encoders["clip"].path, dinov2=encoders["dinov2"].path)
    results = json.loads((tmp_path / "scores.json").read_text())
    assert results["statistics_by_model"]["clip"]["n_valid"] == 4 and "dinov2" not in results["similarities_by_model"]


def test_statistics_of_models_that_scored_different_pictures():
    similarities = {
        "clip": {"a.png": 0.5, "b.png": 0.7, "c.png": None},
        "dinov2": {"a.png": 0.1, "b.png": None, "c.png": 0.3},
    }
    results = results_json(["clip", "longclip", "dinov2"], similarities)
    assert results["model_types"] == ["clip", "longclip", "dinov2"]
    assert results["summary"]["average_scores_by_model"] == {"clip": pytest.approx(0.6), "dinov2": pytest.approx(0.2)}
    assert results["summary"]["overall_average"] == pytest.approx(0.4) and results["summary"]["n_valid"] == 1
    assert results["summary"]["worst_model"] == ["dinov2", pytest.approx(0.2)]
    assert results_json(["clip"], {"clip": {"a.png": None}})["summary"] == {}
