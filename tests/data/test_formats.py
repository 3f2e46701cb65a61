"""Every format of a data folder: which one it is, the same batches from each, and one line for what does not fit."""

import json
import os
import shutil
import tarfile

import numpy as np
import photographs
import pyarrow as pa
import pytest
from photographs import WRITERS, add_member, captions_of, noise
from PIL import Image
from pyarrow import parquet

from uae_jax.data import formats, loader
from uae_jax.data.folder import open_folder
from uae_jax.data.formats.listing import list_folder
from uae_jax.data.formats.records import ReadOptions


def batches_of(source, rows, count, state=None):
    data = loader.make_loader(source, rows, 4, seed=3)
    if state is not None:
        data.set_state(state)
    return [next(data) for _ in range(count)], data.get_state()


def assert_equal(ours, theirs, without=()):
    for batch, other in zip(ours, theirs, strict=True):
        for name in batch.keys() - set(without):
            assert batch[name].tobytes() == other[name].tobytes() and batch[name].dtype == other[name].dtype, name


@pytest.mark.parametrize("name", WRITERS)
def test_the_format_is_found_out_and_told(folders, name):
    expected, _ = WRITERS[name]
    assert formats.detect(list_folder(folders[name])) == expected
    opened = open_folder(folders[name])
    title = formats.FORMATS[expected].title
    assert opened.lines == (f"data: {folders[name]} is {title} (12 images)",)
    assert opened.inspection is not None and opened.inspection.record()["used"] == 12


@pytest.mark.parametrize("choice", ["each", "longest", "shortest"])
def test_the_same_photographs_give_the_same_batches_from_every_format(folders, rows, choice):
    options = ReadOptions(caption_choice=choice)
    expected, _ = batches_of(open_folder(folders["captions"], options).source, rows, 4)
    assert len({bytes(row) for batch in expected for row in batch["pixels"]}) == 12
    for name, folder in folders.items():
        without = ("caption_ids", "caption_mask", "caption_truncated") if name == "images" else ()
        assert_equal(batches_of(open_folder(folder, options).source, rows, 4)[0], expected, without)


@pytest.mark.parametrize("name", WRITERS)
def test_a_loader_continues_at_the_example(folders, rows, name):
    source = open_folder(folders[name]).source
    _, state = batches_of(source, rows, 2)
    expected, _ = batches_of(source, rows, 5)
    again = open_folder(folders[name], check=False).source
    assert_equal(batches_of(again, rows, 3, json.loads(json.dumps(state)))[0], expected[2:])


@pytest.mark.parametrize("choice, expected", [("each", (0, 1)), ("longest", (1, 1)), ("shortest", (0, 0))])
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "images"])
def test_one_of_several_captions_is_chosen(folders, photos, name, choice, expected):
    source = open_folder(folders[name], ReadOptions(caption_choice=choice), check=False).source
    for index, file in enumerate(list(photos)[:2]):
        assert source[index].caption == captions_of(file)[expected[index]]


def test_images_alone_have_no_captions(folders, photos):
    source = open_folder(folders["images"]).source
    assert [source[index].caption for index in range(3)] == [None] * 3 and source.without_caption() == 0
    assert [source[index].id for index in range(12)] == list(photos)


def test_images_of_one_name_in_two_folders_are_two(tmp_path):
    photographs.write_captions(tmp_path, {"a.png": b"", "train/1.jpg": b"", "val/1.jpg": b""})
    for number, name in enumerate(("a.png", "train/1.jpg", "val/1.jpg")):
        Image.new("RGB", (9, 9), (90 * number, 0, 0)).save(tmp_path / name)
    Image.new("RGB", (9, 9), "white").save(tmp_path / "a.jpg")  # a mask: not named, not read
    source = open_folder(tmp_path).source
    assert [int(source[index].image[0, 0, 0] // 80) for index in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    "first, second", [("captions", "metadata.csv"), ("parquet", "webdataset"), ("coco", "captions")]
)
def test_two_formats_in_a_folder_are_refused_unless_one_is_named(photos, tmp_path, first, second):
    (one, write), (other, write_other) = WRITERS[first], WRITERS[second]
    write(tmp_path, photos)
    write_other(tmp_path, photos)
    with pytest.raises(ValueError, match=r"is two formats at once, .*set config.data.format to \w+ or \w+") as refused:
        open_folder(tmp_path)
    assert one in str(refused.value) and other in str(refused.value)
    assert len(open_folder(tmp_path, name=one).source) == len(open_folder(tmp_path, name=other).source) == 12


def test_loose_images_beside_containers_are_a_second_format(photos, tmp_path):
    photographs.write_parquet(tmp_path, photos)
    (tmp_path / "teaser.png").write_bytes(photos["chelsea.png"])
    with pytest.raises(ValueError, match=r"two formats at once, parquet .*train-00000.* and images \(teaser.png\)"):
        open_folder(tmp_path)


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="the data folder .*none does not exist"):
        open_folder(tmp_path / "none")
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ValueError, match="holds no images in any of the formats captions, .*docs/data.md"):
        open_folder(tmp_path)
    for name in formats.FORMATS:
        with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
            open_folder(tmp_path, name=name)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.png")
    Image.fromarray(noise(24, 16)).save(tmp_path / "b.jpg")
    Image.fromarray(noise(9, 9)).save(tmp_path / "c.webp")
    lines = [
        {"file_name": "a.png", "caption": " one "},
        {"image": "b.jpg", "caption": ["two", "drei"]},
        {"file_name": "c.webp", "caption": "vier"},
    ]
    (tmp_path / "captions.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    return tmp_path


def test_captions_with_a_byte_order_mark(folder):
    source = open_folder(folder).source
    assert [source[i].caption for i in range(len(source))] == ["one", "drei", "vier"]
    np.testing.assert_array_equal(source[0].image, noise(20, 30))
    assert source[1].image.shape == (24, 16, 3) and source[2].id == "c.webp"


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"file_name": "a.png", "caption"', "captions.jsonl line 4 is not JSON"),
        ("[1]", "line 4 is not a JSON object"),
        ('{"caption": "x"}', "line 4 names no image"),
        ('{"file_name": "a.png"}', "line 4 has no caption"),
        ('{"file_name": "a.png", "caption": []}', "line 4 has no caption"),
        ('{"file_name": "a.png", "caption": " "}', "line 4 has no caption"),
        ('{"file_name": "a.png", "caption": 7}', "line 4 holds a caption of type int"),
        (r'{"file_name": "a.png", "caption": "\ud83d"}', "line 4 holds a caption with half a character"),
        ('{"file_name": "z.png", "caption": "x"}', "z.png does not exist, but .*captions.jsonl line 4 has a caption"),
    ],
)
def test_broken_lines_are_named(folder, line, message):
    path = folder / "captions.jsonl"
    path.write_text(path.read_text().rstrip("\n") + "\n" + line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_folder(folder)


def test_captions_in_another_encoding_are_named(folder):
    (folder / "captions.jsonl").write_bytes(b'{"file_name": "a.png", "caption": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        open_folder(folder)
    (folder / "captions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no captions"):
        open_folder(folder)
    (folder / "captions.jsonl").unlink()
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt holds a caption that is not UTF-8"):
        open_folder(folder)


def test_text_files_without_an_image_or_with_two_are_named(folder):
    (folder / "captions.jsonl").unlink()
    (folder / "README.txt").write_text("where they come from")
    assert formats.detect(list_folder(folder)) == "images"
    (folder / "a.txt").write_text("one\n\ntwo\n")
    records = open_folder(folder).source.records
    assert [records.captions(index) for index in range(3)] == [("one", "two"), (), ()]
    assert records.remedy(1) == f"write a caption into {folder / 'b.txt'}"
    (folder / "d.txt").write_text("nothing")
    with pytest.raises(ValueError, match="d.txt is a caption without an image beside it"):
        open_folder(folder)
    (folder / "d.txt").unlink()
    Image.fromarray(noise(9, 9)).save(folder / "a.bmp")
    with pytest.raises(ValueError, match="a.txt lies beside two images, a.bmp and a.png"):
        open_folder(folder)
    (folder / "a.TXT").write_text("another")
    with pytest.raises(ValueError, match="a.txt and a.TXT are captions of one image: keep one of them"):
        open_folder(folder)


def test_captions_in_a_folder_below_are_not_passed_over(folder):
    (folder / "part").mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        shutil.move(file, folder / "part" / file.name)
    with pytest.raises(ValueError, match="has no captions.jsonl, but .*part has one: give that folder, or several as"):
        open_folder(folder)
    assert len(open_folder(folder, name="images").source) == 3


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", "file_name,text\na.png,one\nz.png,two\n", "z.png does not exist, but .*metadata.csv line 3"),
        ("metadata.csv", "file,text\na.png,one\n", "metadata.csv line 2 has no file_name: it has file, text"),
        ("metadata.csv", "file_name,text\na.png\n", "metadata.csv line 2 does not have the 2 fields"),
        ("metadata.csv", 'file_name,text\na.png,"one\n', "metadata.csv is not a CSV file"),
        ("metadata.csv", "file_name,text,text\na.png,one,two\n", "metadata.csv has two columns 'text': keep one"),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"text": "b"}', "metadata.jsonl line 2 has no file_name"),
        ("metadata.parquet", "PAR1 cut", "metadata.parquet is not a readable parquet file"),
    ],
)
def test_broken_metadata_is_named(folder, name, content, message):
    (folder / "captions.jsonl").unlink()
    (folder / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_folder(folder)


def test_metadata_files_of_two_kinds_are_refused_and_those_of_subfolders_read(photos, tmp_path):
    some = dict(list(photos.items())[:2])
    for part in ("train/a", "train/b"):
        (tmp_path / part).mkdir(parents=True)
        photographs.write_metadata_csv(tmp_path / part, some)
    source = open_folder(tmp_path, check=False).source
    assert [source[index].id for index in range(4)] == [f"train/{part}/{name}" for part in "ab" for name in some]
    photographs.write_metadata_jsonl(tmp_path / "train" / "b", some)
    with pytest.raises(ValueError, match="train/b has both metadata.csv and metadata.jsonl: keep one"):
        open_folder(tmp_path)


def test_coco_with_one_id_for_two_images_is_refused(photos, tmp_path):
    photographs.write_coco(tmp_path, photos)
    file = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    content["images"][1]["id"] = content["images"][0]["id"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="captions_train2017.json has the id 0 twice, for astronaut.jpg and brick.jpg"):
        open_folder(tmp_path)


def test_coco_names_what_is_absent(photos, tmp_path):
    photographs.write_coco(tmp_path, photos)
    file = tmp_path / "annotations" / "captions_train2017.json"
    content = json.loads(file.read_text())
    assert len(open_folder(file).source) == 12  # the file itself, where a folder has several
    content["annotations"][3]["image_id"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="captions_train2017.json annotation 4 is a caption of an image that the file"):
        open_folder(tmp_path)
    (tmp_path / "train2017" / "coffee.jpg").unlink()
    content["annotations"][3]["image_id"] = 0
    file.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="coffee.jpg does not exist, but .*captions_train2017.json .image 28."):
        open_folder(tmp_path)
    (file.parent / "captions_val2017.json").write_text(file.read_text())
    with pytest.raises(ValueError, match="two files of captions, .*train2017.json and .*val2017.json: name one"):
        open_folder(tmp_path)


@pytest.mark.parametrize("place", ["", "images", "images/train2017", "annotations"])
def test_coco_finds_its_images(photos, tmp_path, place):
    photographs.write_coco(tmp_path, photos)
    shutil.move(tmp_path / "train2017", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / place, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "moved")
    source = open_folder(tmp_path).source
    assert len(source) == 12 and source.records.folder == tmp_path / place


def test_a_parquet_file_without_an_image_column_names_its_columns(tmp_path):
    parquet.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has no image column 'image'; its columns are url, caption: name"):
        open_folder(tmp_path)


def test_parquet_columns_are_found_or_named(photos, tmp_path):
    (name, content), *_ = photos.items()
    table = {"jpg": [content], "thumb": [b"x"], "title": ["short"], "story": ["a long one"]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has several columns that may hold images, jpg, thumb: name one"):
        open_folder(tmp_path)
    assert open_folder(tmp_path, ReadOptions("jpg")).source[0].caption is None
    for choice, text in (("shortest", "short"), ("longest", "a long one")):
        options = ReadOptions("jpg", "title,story", choice)
        assert open_folder(tmp_path, options).source[0].caption == text
    with pytest.raises(ValueError, match="no image column 'title'"):
        open_folder(tmp_path, ReadOptions("title"))
    left = open_folder(tmp_path, ReadOptions("jpg")).source
    assert "config.data.caption_key" in left.records.remedy(0)
    twice = pa.Table.from_arrays([pa.array([content]), pa.array(["a"]), pa.array(["b"])], ["image", "text", "text"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has two columns 'text': write it with one of them"):
        open_folder(tmp_path)


def test_a_parquet_row_without_an_image_is_counted_and_files_of_other_splits_are_left(photos, tmp_path):
    contents = list(photos.values())
    for split, images in (("train", [contents[0], None]), ("test", contents[1:4])):
        table = pa.table({"image": pa.array(images, pa.binary()), "caption": ["a"] * len(images)})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    opened = open_folder(tmp_path)
    assert opened.lines[1] == "data: 1 of 2 images are left out: 1 broken (train-00000-of-00001.parquet row 1)"
    assert "has no image in 'image': remove the row" in opened.inspection.record()["first"][0]
    assert opened.lines[0] == f"data: {tmp_path} is a folder of parquet files with images, split train (2 images)"
    assert len(open_folder(tmp_path, ReadOptions(split="test")).source) == 3
    with pytest.raises(ValueError, match="has the splits test, train, not 'dev'"):
        open_folder(tmp_path, ReadOptions(split="dev"))


def test_a_damaged_parquet_file_is_named(photos, tmp_path):
    photographs.write_parquet(tmp_path, photos)
    file = tmp_path / "data" / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet is not a whole parquet file .*copy it again"):
        open_folder(tmp_path)


@pytest.mark.parametrize("share", [0.999, 0.6, 0.2, 0.001])
def test_a_shard_cut_short_names_the_last_whole_member(photos, tmp_path, share):
    photographs.write_webdataset(tmp_path, photos)
    shard = tmp_path / "00001.tar"
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + member.size for member in tar)
    shard.write_bytes(shard.read_bytes()[: int(end * share)])
    with pytest.raises(ValueError, match="00001.tar is cut short or damaged after (member .*|its beginning): copy the"):
        open_folder(tmp_path)


def test_a_shard_cut_between_members_is_cut_too(photos, tmp_path):
    photographs.write_webdataset(tmp_path, photos)
    shard = tmp_path / "00001.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[3]
    shard.write_bytes(shard.read_bytes()[: third.offset])
    with pytest.raises(ValueError, match="00001.tar is cut short or damaged after member"):
        open_folder(tmp_path)


def test_samples_of_a_shard_need_one_image_and_whole_json(photos, tmp_path):
    (_, content), *_ = photos.items()
    cases = [
        ({"x.txt": b"a"}, "a.tar key x has no image, only txt"),
        ({"x.jpg": content, "x.png": content}, "a.tar key x has the images jpg, png: a sample has one"),
        ({"x.jpg": content, "x.txt": b"a", "x.TXT": b"b"}, "a.tar key x has two members that end in txt"),
    ]
    for members, message in cases:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, value in members.items():
                add_member(tar, name, value)
        with pytest.raises(ValueError, match=message):
            open_folder(tmp_path)
    members = {"d/x.jpg": content, "d/x.seg.png": b"?", "d/._x.jpg": b"?", "d/y.jpg": content, "d/y.json": b"{"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, value in members.items():
            add_member(tar, name, value)
    opened = open_folder(tmp_path)
    assert opened.source[0].id == "a.tar key d/x" and len(opened.source) == 1
    assert "a.tar key d/y has a json member that is not JSON" in opened.inspection.record()["first"][0]
    os.rename(tmp_path / "a.tar", tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="a.tar.gz is compressed, and cannot be read at random: unpack it"):
        open_folder(tmp_path)


def test_array_records_without_images_or_cut_short_are_named(photos, tmp_path):
    photographs.write_array_record(tmp_path, photos)
    with pytest.raises(ValueError, match="record 0 has no image 'photo'; its features are caption, image: name"):
        open_folder(tmp_path, ReadOptions("photo"))
    file = tmp_path / "photos.array_record-00001-of-00002"
    file.write_bytes(file.read_bytes()[:70_000])
    with pytest.raises(ValueError, match="00001-of-00002 is not a whole array_record file .*copy it again"):
        open_folder(tmp_path)


def test_captions_are_found_where_records_lack_them(photos, tmp_path):
    photographs.write_metadata_jsonl(tmp_path, photos)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    del rows[4]["text"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_folder(tmp_path).source
    assert source.without_caption() == 4 and source.without_caption(4) is None
    assert source.records.remedy(4).startswith(f"give {tmp_path / 'metadata.jsonl'} line 5 a caption or text")
