"""Captions belong to the path that was given; text files of a person are read whole, in every encoding of UTF-8."""

import json

import numpy as np
import pytest
from PIL import Image

from uae_jax import evaluate
from uae_jax.evaluation import dpg, geneval_plus
from uae_jax.evaluation.judging import Criteria, make_questions
from uae_jax.evaluation.pairs import Captioned, image_files, read_captions, renamed_alike


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(folder / name)


def lines(path, *records, before=b"", after=b"\n"):
    path.write_bytes(before + "\n".join(json.dumps(record) for record in records).encode() + after)
    return path


def test_a_mask_beside_the_image_is_not_taken_for_it(tmp_path):
    write(tmp_path, "a.jpg", "a.png")
    captions = read_captions(lines(tmp_path / "c.jsonl", {"image": "a.jpg", "caption": "a cat"}))
    assert image_files(tmp_path, captions) == {"a.jpg": tmp_path / "a.jpg"}
    (question, _) = make_questions(Criteria.from_file(None), {"a.jpg": "x"}, {"a.jpg": "y"}, {"a.jpg": "z"}, 0)
    assert question.image_id == "a.jpg"


@pytest.mark.parametrize("field", ["image", "file_name"])
def test_equal_names_in_two_folders_are_two_images(tmp_path, field):
    write(tmp_path, "train/1.jpg", "val/1.jpg")
    records = [{field: f"{part}/1.jpg", "caption": part} for part in ("train", "val")]
    captions = read_captions(lines(tmp_path / "c.jsonl", *records))
    files = image_files(tmp_path, captions)
    assert {name: captions[name].caption for name in files} == {"train/1.jpg": "train", "val/1.jpg": "val"}
    assert all(files[name] == tmp_path / name for name in files)


def test_a_stem_that_two_files_have_is_refused_and_both_are_named(tmp_path):
    write(tmp_path, "a.jpg", "a.png", "b/x.tif", "c.png", "._c.png")
    with pytest.raises(ValueError, match="has a.jpg and a.png for image a; say which"):
        image_files(tmp_path, {"a": Captioned("a cat", None)})
    assert image_files(tmp_path, {"a": Captioned("a cat", "a.png")}) == {"a": tmp_path / "a.png"}
    found = image_files(tmp_path, {"x": Captioned("", None), "c": Captioned("", None)})
    assert found == {"x": tmp_path / "b" / "x.tif", "c": tmp_path / "c.png"}
    with pytest.raises(FileNotFoundError, match=r"has no image a.gif \(1 of 1 are missing\)"):
        image_files(tmp_path, {"a.gif": Captioned("", "a.gif")})


def test_two_files_that_call_one_image_differently_agree():
    ids = {"a": Captioned("", None), "b": Captioned("", None), "1": Captioned("", None)}
    paths = {name: Captioned(name, name) for name in ("x/a.jpg", "b.png", "1.png", "d/1.png")}
    assert sorted(renamed_alike(paths, ids)) == ["1.png", "a", "b", "d/1.png"]
    assert renamed_alike(ids, ids) == ids


def test_lists_of_captions_are_taken_as_in_training(tmp_path):
    records = [{"image": f"{n}.png", "captions": ["first", "second"]} for n in range(3)]
    found = read_captions(lines(tmp_path / "c.jsonl", *records, {"image_id": 7, "text": "other"}))
    assert [captioned.caption for captioned in found.values()] == ["first", "second", "first", "other"]
    evaluate.main(["captions", f"--captions={tmp_path / 'c.jsonl'}", f"--output={tmp_path / 'out.json'}"])
    assert json.loads((tmp_path / "out.json").read_text())["n"] == 4


@pytest.mark.parametrize("tail", [b'\n{"image": "b.png", "capt', b"\nnonsense", b"\n[1]", b'\n{"image": "\xff"}'])
def test_a_broken_last_line_of_a_persons_file_is_named(tmp_path, tail):
    path = lines(tmp_path / "c.jsonl", {"image": "a.png", "caption": "a cat"}, after=tail)
    with pytest.raises(ValueError, match="c.jsonl line 2 is not"):
        read_captions(path)
    with pytest.raises(SystemExit, match="^error: .*line 2 is not"):
        evaluate.main(["captions", f"--captions={path}", f"--output={tmp_path / 'out.json'}"])


@pytest.mark.parametrize(
    "record", [{"caption": "x"}, {"image": ["a"], "caption": "x"}, {"image": "a"}, {"image_id": "", "caption": "x"}]
)
def test_a_line_without_image_or_caption_is_named(tmp_path, record):
    with pytest.raises(ValueError, match="c.jsonl record 2 needs"):
        read_captions(lines(tmp_path / "c.jsonl", {"image_id": "a", "caption": "x"}, record))


BOM = b"\xef\xbb\xbf"


def test_every_text_reader_takes_a_byte_order_mark(tmp_path):
    path = lines(tmp_path / "c.jsonl", {"image": "a.png", "caption": "a cat"}, before=BOM)
    assert read_captions(path)["a.png"].caption == "a cat"
    (tmp_path / "prompts.txt").write_bytes(BOM + b"a cat\na dog\n")
    assert geneval_plus.read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "0.txt").write_bytes(BOM + b"a cat")
    (tmp_path / "dpg" / "._0.txt").write_bytes(b"\x00\x05")
    assert dpg.read_prompts(tmp_path / "dpg") == {"0": "a cat"}
    usual = Criteria.from_file(None)
    text = {"instruction": usual.instruction, "with_image": usual.with_image, "without_image": usual.without_image}
    text["criteria"] = [{"name": name, "question": question} for name, question in usual.criteria]
    (tmp_path / "criteria.json").write_bytes(BOM + json.dumps(text).encode())
    assert Criteria.from_file(tmp_path / "criteria.json") == usual
    (tmp_path / "prompts.txt").write_bytes("a cat".encode("utf-16"))
    with pytest.raises(ValueError, match="prompts.txt is not a text file in UTF-8"):
        geneval_plus.read_prompts(tmp_path / "prompts.txt")
