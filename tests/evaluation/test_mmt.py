"""MMT-Bench: the prompt, the answers' tables, the letter that an answer names, and the averages."""

import base64
import io
import json
import types
import zipfile
from typing import Any

import openpyxl
import pytest
from PIL import Image
from stand_ins import refused

from uae_jax import evaluate
from uae_jax.data import questions
from uae_jax.evaluation import answers, matching, mmt
from uae_jax.files import tables

OPTIONS = {"A": "a red circle", "B": "a blue square", "C": "two crosses"}


def encoded(colour, side=12):
    data = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def item(index, image, **more):
    return {
        "index": str(index),
        "image": image,
        "question": f"What is shown in {index}?",
        "A": "a red circle",
        "B": "a blue square",
        "C": "two crosses",
        "D": "",
        "hint": "",
        "category": f"sub{index % 3}",
        "l2-category": f"meta{index % 3 // 2}",
        "split": "VAL",
        "answer": "ABC"[index % 3],
    } | more


ITEMS = [
    item(7, encoded("red"), hint="look closely"),
    item(8, encoded("blue"), C="None"),
    item(9, "7"),
    item(10, str([encoded("green"), encoded("white", 20)])),
    item(11, ""),
]


class Engine:
    """Answers with the letter of the item, of the number of images and the colour of the first."""

    def __init__(self, limit=None):
        self.limit, self.asked, self.config = limit, [], types.SimpleNamespace(batch_size=2)

    def question_fields(self, question, images):
        return {"question": question, "images": [(image.size, image.getpixel((0, 0))) for image in images]}

    def captions(self, rows):
        for row in rows:
            if self.limit is not None and len(self.asked) >= self.limit:
                raise KeyboardInterrupt
            self.asked.append(row)
            yield (
                row,
                f'"{row.fields["images"][0][1]}",\n{len(row.fields["images"])}\tseen: ({"ABC"[row.sample_id % 3]})',
            )


@pytest.fixture
def engine(monkeypatch):
    engine = Engine()
    settings = dict(seed=42, temperature=0.0, top_p=1.0, max_new_tokens=32, control_tokens=False)
    monkeypatch.setattr(
        answers,
        "load_model",
        lambda options, inputs: types.SimpleNamespace(
            engine=engine, settings=types.SimpleNamespace(**settings | ({"seed": options.seed} if options.seed else {}))
        ),
    )
    return engine


@pytest.fixture
def data(tmp_path):
    tables.write_tsv(tmp_path / "MMT-Bench_VAL.tsv", ITEMS)
    return tmp_path / "MMT-Bench_VAL.tsv"


def test_prompt_is_the_benchmarks(data):
    assert questions.question_text(ITEMS[0]) == (
        "Hint: look closely\nQuestion: What is shown in 7?\nOptions:\nA. a red circle\nB. a blue square\nC. two "
        "crosses\n"
        "Please select the correct answer from the options above. \n"
    )
    assert "Hint" not in questions.question_text(ITEMS[1]) and "C." not in questions.question_text(ITEMS[1])
    assert questions.question_text({"question": "how many?"}) == "Question: how many?\n"


def test_tables_hold_every_column_but_the_images(data, tmp_path, engine, capsys):
    evaluate.main(["mmt", "answer", f"--data={data}", f"--out={tmp_path / 'out'}", "--name=uae"])
    base = tmp_path / "out/uae_MMT-Bench_VAL"
    rows = tables.read_table(base.with_suffix(".tsv"))
    assert rows == tables.read_table(base.with_suffix(".xlsx"))
    assert [row["index"] for row in rows] == [
        "7",
        "8",
        "9",
        "10",
    ]  # 11 has no image, and is no item for VLMEvalKit either
    assert list(rows[0]) == [name for name in ITEMS[0] if name != "image"] + ["prediction"]
    assert all(
        {name: row[name] for name in row if name != "prediction"}.items() <= given.items()
        for row, given in zip(rows, ITEMS)
    )
    assert rows[2]["prediction"] == '"(255, 0, 0)",\n1\tseen: (C)'  # row 9 has the image of row 7
    assert "2\tseen" in rows[3]["prediction"] and engine.asked[3].fields["images"] == [
        ((12, 12), (0, 128, 0)),
        ((20, 20), (255, 255, 255)),
    ]
    evaluate.main(["mmt", "check", f"{base}.tsv", f"--data={data}"])
    evaluate.main(["mmt", "check", f"{base}.xlsx", f"--data={data}"])
    assert capsys.readouterr().out.count("4 items, all answered") == 2
    assert not list(base.parent.glob("*submission*"))


def test_interrupted_answers_go_on(data, tmp_path, engine):
    arguments = ["mmt", "answer", f"--data={data}"]
    evaluate.main([*arguments, f"--out={tmp_path / 'whole'}"])
    engine.asked, engine.limit = [], 2
    assert "stays" in refused(*arguments, f"--out={tmp_path / 'out'}")
    log = tmp_path / "out/uae_jax_MMT-Bench_VAL.answers.jsonl"
    with log.open("a") as file:
        file.write('{"index": "9", "predic')
    engine.asked, engine.limit = [], None
    evaluate.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert [row.index for row in engine.asked] == [2, 3]
    for name in ("uae_jax_MMT-Bench_VAL.tsv", "uae_jax_MMT-Bench_VAL.xlsx"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "begun with seed=42, now it is seed=3" in refused(*arguments, f"--out={tmp_path / 'out'}", "--seed=3")


def test_unreadable_images_are_named_and_the_rest_is_answered(tmp_path, engine, capsys):
    data = tmp_path / "few.tsv"
    tables.write_tsv(data, [item(0, encoded("red")), item(1, "x" * 100), item(2, "99"), item(3, encoded("blue"))])
    assert "has 2 problems" in refused("mmt", "answer", f"--data={data}", f"--out={tmp_path}")
    told = capsys.readouterr().out
    assert "item 1: its image is not a readable image" in told and "item 2: its image is that of row 99" in told
    rows = tables.read_table(tmp_path / "uae_jax_few.tsv")
    assert [bool(row["prediction"]) for row in rows] == [True, False, False, True]
    evaluate.main(["mmt", "check", str(tmp_path / "uae_jax_few.tsv"), f"--data={data}"])
    assert "2 predictions are empty" in capsys.readouterr().out


def test_images_may_be_files(tmp_path, engine):
    rows = [
        {name: value for name, value in item(0, "").items() if name != "image"} | {"image_path": path}
        for path in ("a.png", "['a.png', 'b.png']")
    ]
    rows[1]["index"] = "1"
    tables.write_tsv(tmp_path / "data.tsv", rows)
    for name in ("a", "b"):
        Image.new("RGB", (9, 9), "blue").save(tmp_path / f"{name}.png")
    evaluate.main(["mmt", "answer", f"--data={tmp_path / 'data.tsv'}", f"--out={tmp_path / 'out'}"])
    assert [len(row.fields["images"]) for row in engine.asked] == [1, 2]
    log: Any = types.SimpleNamespace(records=[], append=print)
    assert "give --image_root" in json.dumps(
        list(
            answers.write_answers(
                engine,
                questions.read_items(tmp_path / "data.tsv"),
                ["", ""],
                log,
                tmp_path / "data.tsv",
                tmp_path / "no",
            ).values()
        )
    )


def test_the_split_without_answers_gets_its_submission(tmp_path, engine):
    rows = [
        {name: value for name, value in item(index, encoded("red"), Source="web").items() if name != "answer"}
        for index in (12, 3, 101)
    ]
    tables.write_tsv(tmp_path / "MMT-Bench_ALL.tsv", rows)
    evaluate.main(["mmt", "answer", f"--data={tmp_path / 'MMT-Bench_ALL.tsv'}", f"--out={tmp_path}", "--name=m"])
    sent = tables.read_table(tmp_path / "m_MMT-Bench_ALL_exact_matching_submission.tsv")
    assert [row["index"] for row in sent] == ["3", "12", "101"] and [row["opt"] for row in sent] == ["B", "A", "C"]
    assert {"source", "A", "prediction", "opt", "log"} <= set(sent[0]) and "Source" not in sent[0]
    assert "EvalAI" in refused("mmt", "summary", tmp_path / "m_MMT-Bench_ALL.tsv")


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a blue square", "B"),
        ("The answer is C.", "C"),
        ("A or B", None),
        ("**C**", "C"),
        ("b", None),
        ("", None),
        ("Z", "Z"),
        ("A B C", None),
        ("Cannot determine the answer, A", "Z"),
        ("D", None),
        ("A thing of beauty is a joy for ever", None),  # the letter stands too far from the end
        ("A thing is here", "A"),
        ("it shows a blue square here", "B"),
        ("a red circle and a blue square", None),
        ("A Blue Square", "A"),
        ("The correct answer is **A**, since B and C are wrong", "A"),
        ("the answer is a puzzle", "A"),
        ("the answer is D", None),
        ("a blue square " * 20, None),
        ("Answer: C", "C"),
        ("AB", None),
    ],
)
def test_letters(answer, letter):
    assert matching.chosen_letter(answer, OPTIONS) == letter


def test_accuracy_overall_and_by_meta_task(tmp_path, capsys):
    """meta0 has subtasks of 4 and 1 items: its mean is over subtasks, not over items."""
    given = [("sub0", "meta0", "A", "A")] * 3 + [
        ("sub0", "meta0", "A", "B"),
        ("sub1", "meta0", "B", "A"),
        ("sub2", "meta1", "C", "no idea"),
    ]
    rows = [
        item(index, "") | {"category": sub, "l2-category": meta, "answer": answer, "prediction": said}
        for index, (sub, meta, answer, said) in enumerate(given)
    ]
    tables.write_tsv(tmp_path / "table.tsv", rows)
    evaluate.main(["mmt", "summary", str(tmp_path / "table.tsv"), f"--output={tmp_path / 'scores.json'}"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["overall"]["value"] == pytest.approx(3 / 6) and found["overall"]["n"] == 6
    assert {name: score["value"] for name, score in found["meta_tasks"].items()} == pytest.approx(
        {"meta0": (0.75 + 0) / 2, "meta1": 0}
    )
    assert (
        found["subtasks"]["sub0"]["value"] == 0.75
        and found["mean_of_meta_tasks"] == pytest.approx(0.375 / 2)
        and found["undecided"] == 1
    )
    assert "1 predictions name no option" in capsys.readouterr().out
    judged = [row | {"hit": "1"} for row in rows]
    tables.write_xlsx(tmp_path / "judged.xlsx", judged, ["index", "hit"])
    assert mmt.scores(tables.read_table(tmp_path / "judged.xlsx"))["overall"]["value"] == 1


def test_bad_input_is_one_line(tmp_path, data, engine):
    out = f"--out={tmp_path / 'out'}"
    assert "does not exist" in refused("mmt", "answer", f"--data={tmp_path / 'none.tsv'}", out)
    for text, told in (
        ("index\tquestion\n1\tb\n", "has no column A, image or image_path"),
        ("index\tquestion\tA\timage\n1\tb\n", "row 2 has 2 fields"),
        ("index\tquestion\tA\timage\n", "has no rows"),
        ("index\tquestion\tA\timage\n1\ta\tb\tc\n1\ta\tb\tc\n", "the index 1 twice"),
    ):
        (tmp_path / "bad.tsv").write_text(text)
        assert told in refused("mmt", "answer", f"--data={tmp_path / 'bad.tsv'}", out)
    (tmp_path / "bad.xlsx").write_bytes(b"PK")
    assert "is not an .xlsx workbook" in refused("mmt", "summary", tmp_path / "bad.xlsx")
    assert "neither a .tsv nor" in refused("mmt", "summary", tmp_path / "bad.csv")
    evaluate.main(["mmt", "answer", f"--data={data}", out])
    rows = tables.read_table(tmp_path / "out/uae_jax_MMT-Bench_VAL.tsv")
    tables.write_tsv(tmp_path / "part.tsv", [rows[0] | {"question": "else"}, rows[1] | {"index": "99"}])
    assert "has 5 problems" in refused("mmt", "check", tmp_path / "part.tsv", f"--data={data}")


def test_workbooks_keep_every_character_that_xml_can_hold(tmp_path):
    rows = [
        {"index": str(n), **{f"c{k}": f'<&> "é" 東京 =1+1 \n\t{k}' for k in range(30)}, "bad": "a\x07b\uffff", "": "x"}
        for n in range(3)
    ]
    tables.write_xlsx(tmp_path / "a.xlsx", rows, ["index"])
    expected = [{**row, "bad": "a b "} for row in rows]
    for row in expected:
        del row[""]  # a column without a name cannot be found again
    assert tables.read_xlsx(tmp_path / "a.xlsx") == expected


def test_text_in_workbooks_is_never_a_formula_and_too_long_text_is_told(tmp_path):
    path = tmp_path / "a.xlsx"
    rows = [{"text": text} for text in ("=1+1", "#N/A", "12", " padded ", "TRUE")]
    tables.write_xlsx(path, rows)
    assert tables.read_xlsx(path) == rows
    assert b"<f>" not in zipfile.ZipFile(path).read("xl/worksheets/sheet1.xml")
    with pytest.warns(UserWarning, match="a.xlsx holds the first 32767 characters of 1 longer texts"):
        tables.write_xlsx(path, [{"text": "x" * 40000}, {"text": "short"}])
    assert [len(row["text"]) for row in tables.read_xlsx(path)] == [32767, 5]


def test_workbooks_of_other_programs_are_read(tmp_path):
    """Shared strings, numbers, truth values, gaps, and a second sheet."""
    workbook = openpyxl.Workbook()
    first, second = workbook.worksheets[0], workbook.create_sheet("other")
    for row in (
        ["index", None, "hit", "note"],
        [7, "unnamed", 0.5, "a"],
        [None] * 4,
        [8, None, True],
        ["9", 1, 1, "="],
    ):
        first.append(row)
    second.append(["nothing"])
    workbook.save(tmp_path / "a.xlsx")
    assert tables.read_xlsx(tmp_path / "a.xlsx") == [
        {"index": "7", "hit": "0.5", "note": "a"},
        {"index": "8", "hit": "1", "note": ""},
        {"index": "9", "hit": "1", "note": "="},
    ]
