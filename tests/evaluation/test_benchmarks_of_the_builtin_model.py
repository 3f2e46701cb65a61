"""The built-in model through the commands: scenes generated, checked and scored; questions answered."""

import json

import numpy as np
import pytest
from PIL import Image
from stand_ins import contents, geneval_pictures

import uae_jax
from uae_jax import evaluate
from uae_jax.data import scenes, tokenizer
from uae_jax.data.questions import question_text
from uae_jax.evaluation import answers, drawing
from uae_jax.files import tables
from uae_jax.stages.inference import Row


@pytest.fixture(scope="module")
def model():
    return uae_jax.load("", steps=16, batch_size=4, temperature=0.0, guidance_scale=5.0)


@pytest.fixture
def loaded(model, monkeypatch):
    """Both commands take the loaded model, whose programs are compiled once."""
    for module in (drawing, answers):
        monkeypatch.setattr(module, "load_model", lambda options, inputs: model)


def test_scenes_are_drawn_checked_and_scored(loaded, model, tmp_path, capsys, monkeypatch):
    arguments = ["geneval", "write", "--prompts=scenes", "--per_tag=1", "--images_per_prompt=3"]
    evaluate.main([*arguments, f"--out={tmp_path / 'whole'}"])
    generate, calls = type(model).generate, []

    def stopping(self, texts, **more):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, texts, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", stopping)
        with pytest.raises(SystemExit):
            evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert len(list((tmp_path / "out").rglob("*.png"))) == 8
    (tmp_path / "out/00000/samples/00001.png").unlink()
    evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    evaluate.main(["geneval", "check", str(tmp_path / "out"), "--prompts=scenes"])
    assert len(list(geneval_pictures(tmp_path / "out"))) == 18
    capsys.readouterr()
    evaluate.main(["geneval", "score", str(tmp_path / "out")])
    scored = capsys.readouterr().out
    evaluate.main(["geneval", "summary", str(tmp_path / "out.results.jsonl")])
    assert capsys.readouterr().out in scored and "overall (mean of tags)" in scored
    records = [json.loads(line) for line in (tmp_path / "out.results.jsonl").read_text().splitlines()]
    assert (
        sum(record["correct"] for record in records if record["tag"] == "single_object") >= 2
    )  # it follows its prompts


def test_the_command_loads_the_model_with_its_flags(tmp_path, capsys):
    evaluate.main(
        [
            "geneval",
            "write",
            "--prompts=scenes",
            "--per_tag=1",
            "--images_per_prompt=1",
            "--steps=4",
            "--batch_size=4",
            "--seed=42",
            f"--out={tmp_path / 'out'}",
        ]
    )
    assert "6 images written, 0 were complete" in capsys.readouterr().out
    settings = json.loads((tmp_path / "out.settings.json").read_text())
    assert (settings["steps"], settings["seed"], settings["size"], settings["per_tag"]) == (4, 42, 32, 1)


def test_questions_are_answered_from_their_own_pictures(loaded, model, tmp_path):
    """One image or two: what is said does not depend on the batch."""
    pictures = [Image.fromarray(scenes.draw(scenes.scene_at("test", index))) for index in range(3)]
    rows = []
    for index, shown in enumerate(([0], [1], [2], [0, 1])):
        for number in shown:
            pictures[number].save(tmp_path / f"{number}.png")
        rows.append(
            {
                "index": str(index),
                "question": "describe",
                "A": "red",
                "B": "blue",
                "image_path": str([f"{number}.png" for number in shown]),
            }
        )
    tables.write_tsv(tmp_path / "data.tsv", rows)
    evaluate.main(["mmt", "answer", f"--data={tmp_path / 'data.tsv'}", f"--out={tmp_path}", "--name=m"])
    said = {row["index"]: row["prediction"] for row in tables.read_table(tmp_path / "m_data.tsv")}
    engine = model.engine
    for row in rows[::3]:
        shown = [pictures[int(number)] for number in (["0"] if row["index"] == "0" else ["0", "1"])]
        fields = engine.question_fields(question_text(row), shown)
        assert [text for _, text in engine.captions([Row(0, 5, fields)])] == [said[row["index"]]]


def test_pictures_come_before_the_question(model):
    engine, picture = model.engine, scenes.draw(scenes.scene_at("test", 0))
    fields = engine.question_fields("describe", [picture, picture])
    ids = fields["prompt_ids"][fields["prompt_mask"]].tolist()
    pad, word = (tokenizer.token_id(engine.system.tokenizer, token) for token in (tokenizer.IMAGE_PAD, "describe"))
    assert max(place for place, token in enumerate(ids) if token == pad) < ids.index(word)
    assert set(fields["patch_images"].tolist()) - {-1} == {0, 1}
    alone = engine.image_fields(picture)
    used = alone["patch_images"] == 0
    np.testing.assert_array_equal(fields["patches"][fields["patch_images"] == 1], alone["patches"][used])
    assert sorted(tokenizer.caption_prompt_ids(engine.system.tokenizer, "describe", [2, 3])) == sorted(
        tokenizer.caption_prompt_ids(engine.system.tokenizer, "describe", [2, 3], images_first=True)
    )
    with pytest.raises(ValueError, match="at least one image"):
        engine.question_fields("describe", [])
