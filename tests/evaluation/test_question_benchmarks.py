"""MMBench, MMMU and POPE: circular groups, open questions, images in the text, yes and no, and their averages."""

import itertools
import json

import pytest
from stand_ins import refused
from test_mmt import encoded, engine, item  # noqa: F401 (a fixture)

from uae_jax import evaluate
from uae_jax.evaluation import mmb, mmmu, pope
from uae_jax.evaluation.matching import chosen_yes_no
from uae_jax.files import tables


def answered(index, said, answer, **more):
    return item(index, "") | {"prediction": said, "answer": answer} | more


def summary(command, rows, tmp_path):
    tables.write_tsv(tmp_path / "table.tsv", rows)
    evaluate.main([command, "summary", str(tmp_path / "table.tsv"), f"--output={tmp_path / 'scores.json'}"])
    return json.loads((tmp_path / "scores.json").read_text())


# ---- MMBench ----


def test_a_circular_group_is_right_only_as_a_whole(tmp_path, capsys):
    names = {"category": "colour", "l2-category": "perception", "split": "dev"}
    rows = [
        answered(5, "A", "A", **names),
        answered(1_000_005, "B", "B", **names),
        answered(2_000_005, "C", "C", **names),
        answered(6, "A", "A", **names),
        answered(1_000_006, "B", "C", **names),  # one rotation is wrong
        answered(7, "no idea", "C", **names | {"category": "count"}),
    ]
    found = summary("mmb", rows, tmp_path)
    scores = found["splits"]["dev"]
    assert scores["overall"]["value"] == pytest.approx(1 / 3) and scores["overall"]["n"] == 3
    assert {name: score["value"] for name, score in scores["category"].items()} == {"colour": 0.5, "count": 0}
    assert scores["l2-category"]["perception"]["n"] == 3
    assert (found["rows"], found["groups"], found["vanilla"]) == (6, 3, pytest.approx(2 / 3))
    assert found["undecided"] == 1 and not found["without_first_row"]
    told = capsys.readouterr().out
    assert "overall: 33.33 %" in told and "l2-category perception" in told and "first rows alone: 66.67 %" in told


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_rows_does_not_matter(order):
    rows = [answered(5, "A", "A"), answered(1_000_005, "B", "C"), answered(6, "A", "A")]
    first, whole, lost = mmb.grouped([rows[at] for at in order], [[1.0, 0.0, 1.0][at] for at in order])
    assert {row["index"]: hit for row, hit in zip(first, whole)} == {"5": 0.0, "6": 1.0} and not lost


def test_rotations_without_their_first_row_are_told(tmp_path, capsys):
    found = summary("mmb", [answered(5, "A", "A"), answered(1_000_006, "B", "B")], tmp_path)
    assert found["without_first_row"] == ["1000006"] and found["groups"] == 1
    assert "1 rows count nowhere" in capsys.readouterr().out
    tables.write_tsv(tmp_path / "table.tsv", [answered(1_000_006, "B", "B")])
    assert "the first rows of its groups are missing" in refused("mmb", "summary", tmp_path / "table.tsv")
    tables.write_tsv(tmp_path / "table.tsv", [answered(5, "B", "B") | {"index": "a5"}])
    assert "the index 'a5'" in refused("mmb", "summary", tmp_path / "table.tsv")


def test_verdicts_of_vlmevalkit_are_read_as_they_are():
    rows = [answered(5, "x", "A", hit="1", split="dev"), answered(6, "x", "B", hit="0", split="test")]
    found = mmb.scores(rows)
    assert {split: scores["overall"]["value"] for split, scores in found["splits"].items()} == {"dev": 1, "test": 0}
    assert "undecided" not in found
    with pytest.raises(ValueError, match="only the MMBench server"):
        mmb.scores([{"index": "5", "prediction": "A"}])


# ---- MMMU ----


def test_an_open_question_counts_by_the_text_of_its_answer():
    nothing = {"A": "", "B": "", "C": "", "split": "validation", "category": "Art", "l2-category": "Humanities"}
    rows = [
        answered(1, "It is 42 km.", "42 km", **nothing),
        answered(2, "Other Answers", "42 km", **nothing),
        answered(3, "B", "B", split="dev", category="Art"),
        answered(4, "B", "A", split="validation", category="Law"),
    ]
    found = mmmu.scores(rows)
    validation = found["splits"]["validation"]
    assert validation["overall"]["value"] == pytest.approx(1 / 3) and found["open"] == 2
    assert {name: score["value"] for name, score in validation["category"].items()} == {"Art": 0.5, "Law": 0}
    assert found["splits"]["dev"]["overall"]["n"] == 1 and list(found["splits"]["dev"]["category"]) == ["Art"]
    with pytest.raises(ValueError, match="only the MMMU server"):
        mmmu.scores([{"index": "1", "A": "x", "prediction": "A"}])


def test_images_are_asked_in_the_text_and_one_that_is_missing_is_named(tmp_path, engine, capsys):  # noqa: F811
    both = str([encoded("red"), encoded("blue", 20)])
    data = tmp_path / "MMMU_DEV_VAL.tsv"
    rows = [item(1, both, question="Is <image 2> bluer than <image 1>?"), item(2, both, question="See <image 3>.")]
    tables.write_tsv(data, rows)
    place = engine.question_fields

    def question_fields(question, images):
        from uae_jax.data.questions import placed_images

        placed_images(question, images)
        return place(question, images)

    engine.question_fields = question_fields
    assert "has 1 problem" in refused("mmmu", "answer", f"--data={data}", f"--out={tmp_path}", "--name=m")
    assert "item 2: its text names <image 3>, but it has 2 images" in capsys.readouterr().out
    said = tables.read_table(tmp_path / "m_MMMU_DEV_VAL.xlsx")
    assert [bool(row["prediction"]) for row in said] == [True, False]
    evaluate.main(["mmmu", "check", str(tmp_path / "m_MMMU_DEV_VAL.tsv"), f"--data={data}"])


# ---- POPE ----


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Yes.", "Yes"),
        ("no, there is none", "No"),
        ("yes and no", "Unknown"),
        ("", "Unknown"),
        ("nothing", "Unknown"),
        ("**Yes**, it is", "Yes"),
        ("Yes,yes", "Yes"),
    ],
)
def test_yes_and_no_are_words(said, expected):
    assert chosen_yes_no(said) == expected


def test_rates_are_those_of_yes_overall_and_by_category(tmp_path, capsys):
    given = [
        ("Yes", "yes", "random"),
        ("Yes", "no", "random"),
        ("No", "yes", "popular"),
        ("No", "no", "popular"),
        ("Yes", "a cat", "adversarial,random"),  # counts in both categories, and twice
        ("No", "No.", "adversarial"),
    ]
    rows = [
        {"index": str(n), "question": "Is there a cat?", "answer": answer, "prediction": said, "category": category}
        for n, (answer, said, category) in enumerate(given)
    ]
    found = summary("pope", rows, tmp_path)
    # Yes: 4 asked, 2 said, 1 of them right; right: rows 0, 3, 5 of 7
    assert found["overall"] == pytest.approx(
        {"f1": 2 * 0.5 * 0.25 / 0.75, "accuracy": 3 / 7, "precision": 0.5, "recall": 0.25, "yes_rate": 2 / 7, "n": 7}
    )
    assert {name: rates["accuracy"] for name, rates in found["categories"].items()} == pytest.approx(
        {"random": 1 / 3, "popular": 0.5, "adversarial": 0.5}
    )
    assert found["categories"]["popular"]["recall"] == found["categories"]["popular"]["f1"] == 0
    assert found["accuracy_interval"]["n"] == 7 and found["accuracy_interval"]["prompts"] == 6
    assert found["unknown"] == 2
    assert "overall: f1 33.33  accuracy 42.86  precision 50.00  recall 25.00" in capsys.readouterr().out
    extracted = [row | {"extracted": "Yes"} for row in rows]
    assert pope.scores(extracted)["overall"]["recall"] == 1
    with pytest.raises(ValueError, match="row 0 has the answer 'maybe'"):
        pope.scores([rows[0] | {"answer": "maybe"}])


def test_the_question_of_pope_asks_for_yes_or_no(tmp_path, engine):  # noqa: F811
    asked = [
        {"index": "1", "image": encoded("red"), "question": "Is it red?", "answer": "Yes", "category": "random"},
        {"index": "2", "image": encoded("red"), "question": "Red? Answer yes or no.", "answer": "No", "category": "x"},
    ]
    tables.write_tsv(tmp_path / "POPE.tsv", asked)
    evaluate.main(["pope", "answer", f"--data={tmp_path / 'POPE.tsv'}", f"--out={tmp_path}", "--name=m"])
    assert [row.fields["question"] for row in engine.asked] == [
        "Is it red? Please answer yes or no.",
        "Red? Answer yes or no.",
    ]
    rows = tables.read_table(tmp_path / "m_POPE.tsv")
    assert list(rows[0]) == ["index", "question", "answer", "category", "prediction"]
    assert "has no column answer" in refused("pope", "check", tmp_path / "m_POPE.tsv", f"--data={_without(tmp_path)}")


def _without(tmp_path):
    tables.write_tsv(tmp_path / "bad.tsv", [{"index": "1", "image": encoded("red"), "question": "Red?"}])
    return tmp_path / "bad.tsv"
