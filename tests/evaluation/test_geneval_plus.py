"""GenEval++'s images under the names that its judge's script asks for, and its output file."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from stand_ins import Painter, contents, refused, sample_pixels

from uae_jax import evaluate
from uae_jax.evaluation import geneval_plus

ENTRIES = [
    {
        "tag": tag,
        "include": [{"class": "bus", "count": 1, "color": "brown"}],
        "prompt": f" A photo of a {tag}, number {index}",
    }
    for index, tag in enumerate(["color_attr", "color_attr", "counting", "size_spatial_attr"])
]

pytestmark = pytest.mark.usefixtures("painter")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "Geneval++.jsonl"
    path.write_text("\n\n".join(json.dumps(entry) for entry in ENTRIES) + "\n")
    return path


def judged(prompts, folder, verdicts):
    """Eval-gpt-4.1-geneval++.py: its output for given verdicts, read from the folder by its rules."""
    lines = [json.loads(line) for line in pathlib.Path(prompts).read_text().splitlines() if line.strip()]
    results, right, total = [], {}, {}
    for index, (entry, verdict) in enumerate(zip(lines, verdicts, strict=True)):
        path = folder / f"{index + 1}.jpg"
        found = path.exists()
        if found:
            with Image.open(path) as image:
                image.convert("RGB")
        result = verdict if found else {"correct": 0, "reason": "Image not found"}
        results.append({"id": index + 1, "tag": entry["tag"], "prompt": entry["prompt"].strip(), "result": result})
        total[entry["tag"]] = total.get(entry["tag"], 0) + 1
        right[entry["tag"]] = right.get(entry["tag"], 0) + (result.get("correct", 0) == 1)
    shares = {tag: round(right[tag] / total[tag], 4) for tag in total}
    return {
        "overall_results": results,
        "tag_accuracy": shares,
        "overall_score_mean_of_tags": round(sum(shares.values()) / len(shares), 4),
    }


def test_pictures_are_numbered_from_one_and_scored_per_tag(prompts, tmp_path, capsys):
    out = tmp_path / "image"
    evaluate.main(["geneval_plus", "write", f"--prompts={prompts}", f"--out={out}", "--size=64"])
    assert sorted(path.name for path in out.iterdir()) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    for index, entry in enumerate(ENTRIES):
        seen = np.asarray(Image.open(out / f"{index + 1}.jpg"), np.float32)
        errors = [
            np.abs(seen - sample_pixels(other["prompt"].strip(), number, 64)).mean()
            for number, other in enumerate(ENTRIES)
        ]
        assert np.argmin(errors) == index and errors[index] < 20
    evaluate.main(["geneval_plus", "check", str(out)])
    verdicts = [
        {"correct": 1, "reason": ""},
        {"correct": 0, "reason": "no"},
        {"correct": True},
        {"correct": -1, "reason": "failed"},
    ]
    output = judged(prompts, out, verdicts)
    (tmp_path / "Output.json").write_text(json.dumps(output))
    evaluate.main(["geneval_plus", "summary", str(tmp_path / "Output.json"), f"--output={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["overall"]["value"] == pytest.approx(output["overall_score_mean_of_tags"]) == pytest.approx(0.5)
    assert {tag: score["value"] for tag, score in found["tags"].items()} == pytest.approx(output["tag_accuracy"])
    assert "1 images were not judged" in capsys.readouterr().out


def test_an_interrupted_folder_is_finished(prompts, tmp_path, monkeypatch):
    arguments = ["geneval_plus", "write", f"--prompts={prompts}", "--batch_size=1"]
    evaluate.main([*arguments, f"--out={tmp_path / 'whole'}"])
    monkeypatch.setattr(Painter, "limit", 2)
    assert "stays" in refused(*arguments, f"--out={tmp_path / 'out'}")
    assert "has 2 problems" in refused("geneval_plus", "check", tmp_path / "out")
    monkeypatch.setattr(Painter, "limit", None)
    evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_texts_one_a_line_draw_the_same(prompts, tmp_path):
    texts = tmp_path / "Geneval++.txt"
    texts.write_text("".join(entry["prompt"] + "\n" for entry in ENTRIES))
    assert geneval_plus.read_prompts(texts) == geneval_plus.read_prompts(prompts)


def test_missing_pictures_are_named_and_count_as_wrong(prompts, tmp_path, capsys):
    out = tmp_path / "image"
    evaluate.main(["geneval_plus", "write", f"--prompts={prompts}", f"--out={out}"])
    (out / "3.jpg").rename(out / "3.png")
    refused("geneval_plus", "check", out, f"--prompts={prompts}")
    told = capsys.readouterr().out
    assert "3.jpg is missing" in told and "3.png is not read by" in told
    (tmp_path / "Output.json").write_text(json.dumps(judged(prompts, out, [{"correct": 1}] * 4)))
    found = geneval_plus.summarise(geneval_plus.read_results(tmp_path / "Output.json"))
    assert found["tags"]["counting"]["value"] == 0 and "1 images were missing" in found["warnings"][0]


def test_bad_input_is_one_line(prompts, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    for name in ("none.jsonl", "none.txt"):
        assert "does not exist" in refused("geneval_plus", "write", f"--prompts={tmp_path / name}", out)
    (tmp_path / "empty.txt").write_text("\n")
    assert "is empty" in refused("geneval_plus", "write", f"--prompts={tmp_path / 'empty.txt'}", out)
    assert "does not exist" in refused("geneval_plus", "check", tmp_path / "none")
    (tmp_path / "some").mkdir()
    assert "give --prompts" in refused("geneval_plus", "check", tmp_path / "some")
    for content, told in (
        ("{", "is not JSON"),
        ("[]", "has no overall_results"),
        ('{"overall_results": [{"id": 1}]}', "result 1 lacks a field"),
    ):
        (tmp_path / "Output.json").write_text(content)
        assert told in refused("geneval_plus", "summary", tmp_path / "Output.json")
