"""GenEval's folder: read by the evaluator's own rules, finished after any interruption, and scored."""

import json

import numpy as np
import pytest
from PIL import Image
from stand_ins import SIZE, Painter, contents, geneval_pictures, geneval_result, refused, sample_pixels, snapshot

from uae_jax import evaluate
from uae_jax.data import scenes
from uae_jax.data.scene_prompts import TAGS, check_prompt, check_scene, scene_prompts
from uae_jax.evaluation import geneval
from uae_jax.evaluation.benchmark_commands import grouped_scores

ENTRIES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "zebra", "count": 1, "position": ["right of", 0]}],
        "prompt": "a photo of a zebra right of a cow",
    },
]

pytestmark = pytest.mark.usefixtures("painter")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    return path


def write(prompts, out, *more):
    evaluate.main(["geneval", "write", f"--prompts={prompts}", f"--out={out}", *more])


def test_the_evaluator_finds_every_picture_with_its_prompt(prompts, tmp_path, capsys):
    write(prompts, tmp_path / "out")
    seen = list(geneval_pictures(tmp_path / "out"))
    assert len(seen) == 12
    for index, entry in enumerate(ENTRIES):
        paths = sorted(path for metadata, path in seen if metadata == entry)
        assert [path.replace(str(tmp_path), "") for path in paths] == [
            f"/out/{index:05d}/samples/{sample:05d}.png" for sample in range(4)
        ]
        for sample, path in enumerate(paths):
            np.testing.assert_array_equal(
                np.asarray(Image.open(path)), sample_pixels(entry["prompt"], 4 * index + sample)
            )
    evaluate.main(["geneval", "check", str(tmp_path / "out"), f"--prompts={prompts}"])
    assert "3 prompts with 4 images each" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [0, 1, 5, 11])
def test_an_interrupted_folder_is_finished_as_if_nothing_had_happened(prompts, tmp_path, monkeypatch, limit):
    write(prompts, tmp_path / "whole")
    monkeypatch.setattr(Painter, "limit", limit)
    with pytest.raises(SystemExit, match="what was written stays"):
        write(prompts, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert sum(name.endswith(".png") for name in before) == limit // 3 * 3
    (tmp_path / "out/00000/samples").mkdir(exist_ok=True)
    (tmp_path / "out/00000/samples/.00003.png.part").write_bytes(b"\x89PNG half of it")
    monkeypatch.setattr(Painter, "limit", None)
    write(prompts, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    after = snapshot(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))


def test_a_damaged_picture_is_noticed_and_only_it_is_drawn_again(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    write(prompts, out)
    before = snapshot(out)
    cut, small, gone = (out / f"0000{index}/samples/00002.png" for index in range(3))
    cut.write_bytes(cut.read_bytes()[:-30])
    Image.new("RGB", (4, 4)).save(small)
    gone.unlink()
    error = refused("geneval", "check", out)
    told = capsys.readouterr().out
    assert "has 3 problems" in error
    assert (
        f"{cut} is not a readable image" in told
        and f"{small} is 4 x 4 pixels" in told
        and "holds 3 images instead of 4" in told
    )
    write(prompts, out)
    after = snapshot(out)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    kept = [name for name in after if name.endswith(".png") and not name.endswith("00002.png")]
    assert len(kept) == 9 and all(after[name] == before[name] for name in kept)


@pytest.mark.parametrize(
    "change, told",
    [
        ("--seed=7", "begun with seed=42, now it is seed=7"),
        ("--steps=3", "begun with steps=2, now it is steps=3"),
        ("--images_per_prompt=2", "images_per_prompt=4"),
        ("--without_adapters", "adapters=True, now it is adapters=False"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_changed(prompts, tmp_path, change, told):
    write(prompts, tmp_path / "out", "--seed=42")
    before = snapshot(tmp_path)
    assert told in refused("geneval", "write", f"--prompts={prompts}", f"--out={tmp_path / 'out'}", change)
    assert snapshot(tmp_path) == before


def test_other_prompts_and_unknown_folders_are_refused(prompts, tmp_path):
    write(prompts, tmp_path / "out")
    prompts.write_text(json.dumps(ENTRIES[0]))
    assert "begun with count=3, prompts=" in refused(
        "geneval", "write", f"--prompts={prompts}", f"--out={tmp_path / 'out'}"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("not a benchmark")
    assert "is not empty" in refused("geneval", "write", f"--prompts={prompts}", f"--out={tmp_path / 'mine'}")


@pytest.mark.parametrize(
    "content, told",
    [
        (None, "does not exist"),
        ("", "is empty"),
        ('{"tag": "a", "include": [], "prompt": "b"}\n{"tag": ', "line 2 is not JSON"),
        ('\n{"tag": "a", "include": []}', "line 2 has no 'prompt'"),
        ('{"tag": "a", "include": "b", "prompt": "c"}', "line 1 has include='b'"),
        ("[1]", "line 1 is not a JSON object"),
        (json.dumps({"tag": "a", "include": [], "prompt": "word " * 60}), "the prompt of"),
    ],
)
def test_bad_prompts_are_named(tmp_path, content, told):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    assert told in refused("geneval", "write", f"--prompts={path}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda out: (out / "00001/metadata.jsonl").write_text("{}"), "has no tag and no include and no prompt"),
        (lambda out: (out / "00001/metadata.jsonl").write_text('{"a": 1}\n{"a": 2}'), "is not one JSON object"),
        (lambda out: (out / "00001/metadata.jsonl").write_text(json.dumps(ENTRIES[0])), "is not line 2 of the prompts"),
        (
            lambda out: (out / "00001/samples/00000.png").rename(out / "00001/samples/00000.jpg"),
            "is ignored by the evaluator",
        ),
        (lambda out: (out / "00001/samples/00000.png.bak").write_text("x"), "is taken for an image by the evaluator"),
        (lambda out: (out / "00001").rename(out / "one"), "00001 is missing"),
        (lambda out: (out / "00002").rename(out / "00003"), "is beyond the 3 prompts"),
        (
            lambda out: Image.new("RGB", (8, 8)).save(out / "00001/samples/00001.png", format="JPEG"),
            "is a JPEG file by its content",
        ),
    ],
)
def test_check_names_what_the_evaluator_would_stumble_over(prompts, tmp_path, capsys, spoil, told):
    write(prompts, tmp_path / "out")
    spoil(tmp_path / "out")
    refused("geneval", "check", tmp_path / "out", f"--prompts={prompts}")
    assert told in capsys.readouterr().out


def test_check_without_prompts_knows_how_many_were_begun(prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Painter, "limit", 3)
    with pytest.raises(SystemExit):
        write(prompts, tmp_path / "out", "--images_per_prompt=2")
    refused("geneval", "check", tmp_path / "out")
    assert "00002/samples is missing" in capsys.readouterr().out
    for folder in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "folder" in refused("geneval", "check", folder)


def test_summary_is_that_of_the_official_script(tmp_path, capsys):
    rng = np.random.default_rng(1)
    lines, shares = [], {}
    for index, entry in enumerate(ENTRIES * 5):
        entry = {**entry, "prompt": f"{entry['prompt']} {index}"}
        right = rng.random(4) < 0.6
        shares.setdefault(entry["tag"], []).extend(right)
        lines += [
            geneval_result(entry, f"/images/{index:05d}/samples/{sample:05d}.png", bool(value))
            for sample, value in enumerate(right)
        ]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    evaluate.main(["geneval", "summary", str(tmp_path / "results.jsonl"), f"--output={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["overall"]["value"] == pytest.approx(np.mean([np.mean(values) for values in shares.values()]))
    assert {tag: score["value"] for tag, score in found["tags"].items()} == pytest.approx(
        {tag: np.mean(values) for tag, values in shares.items()}
    )
    assert found["overall"]["n"] == 60 and found["overall"]["prompts"] == 15 and found["warnings"] == []
    assert all(score["low"] <= score["value"] <= score["high"] for score in (found["overall"], *found["tags"].values()))
    any_right = np.mean(
        [np.any([json.loads(line)["correct"] for line in lines[start : start + 4]]) for start in range(0, 60, 4)]
    )
    assert found["correct_prompts"] == pytest.approx(any_right)
    assert f"{100 * found['overall']['value']:.2f} %" in capsys.readouterr().out
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n{")
    assert "line 60 is not JSON" in refused("geneval", "summary", tmp_path / "results.jsonl")


def test_intervals_are_over_prompts_not_over_pictures():
    together = [("tag", str(prompt), float(prompt % 2)) for prompt in range(10) for _ in range(100)]
    apart = [("tag", str(number), score) for number, (_, _, score) in enumerate(together)]
    wide, narrow = (grouped_scores(records)["overall"] for records in (together, apart))
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])
    with pytest.raises(ValueError, match="no results"):
        grouped_scores([])


def test_scenes_are_scored_as_the_checker_says(tmp_path, capsys, monkeypatch):
    """A painter that follows its prompts, except for the tag `counting`."""
    entries = scene_prompts(3)
    wanted = {}
    for entry in entries:
        right = entry["tag"] != "counting"
        wanted[entry["prompt"]] = next(
            scene
            for scene in map(lambda i: scenes.scene_at("train", i), range(20000))
            if check_scene(entry, scene) == right
        )
    monkeypatch.setattr(
        Painter,
        "generate",
        lambda self, texts, *, sample_ids: [Image.fromarray(scenes.draw(wanted[text])) for text in texts],
    )
    write("scenes", tmp_path / "out", "--per_tag=3", "--images_per_prompt=2", "--size=32")
    evaluate.main(["geneval", "check", str(tmp_path / "out"), "--prompts=scenes"])
    evaluate.main(["geneval", "score", str(tmp_path / "out")])
    assert "tag" not in capsys.readouterr().err
    lines = (tmp_path / "out.results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 36 and set(records[0]) == {
        "filename",
        "tag",
        "prompt",
        "correct",
        "reason",
        "metadata",
        "details",
    }
    for record in records:
        picture = np.asarray(Image.open(record["filename"]))
        assert (
            record["correct"] == check_prompt(json.loads(record["metadata"]), picture) == (record["tag"] != "counting")
        )
        assert bool(record["reason"]) != record["correct"] and json.loads(record["details"])
    found = geneval.summarise(records)
    assert found["overall"]["value"] == pytest.approx(5 / 6) and found["tags"]["counting"]["value"] == 0
    assert tuple(found["tags"]) == TAGS


def test_only_scenes_are_scored_here(prompts, tmp_path):
    write(prompts, tmp_path / "out")
    assert "asks for 'bench'" in refused("geneval", "score", tmp_path / "out")
    assert SIZE == 8 and not (tmp_path / "out.results.jsonl").exists()
